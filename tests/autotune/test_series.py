"""Timing many problems in a short time: all or nothing."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.autotune.toys import Problem, Size, toy
from tilewright.autotune import tables
from tilewright.autotune.clock import CpuClock
from tilewright.autotune.device import DeviceKind
from tilewright.autotune.series import FEWEST_PAIRS, Asked, tune_series
from tilewright.autotune.space import Tunable

CPU = DeviceKind("Toy", "cpu-toy", 0, "1")


@contextlib.contextmanager
def cpu_toy(**options: Any) -> Iterator[tuple[Tunable, Any]]:
    with toy(device=CPU, **options) as (tuned, clock):
        yield tuned, clock


def asked(tuned: Tunable, *sizes: int) -> list[Asked]:
    return [Asked(tuned, Problem(m), lambda m=m: tuned.hooks.trials(tuned, Problem(m))) for m in sizes]


def slow_clock(step: float):
    return itertools.count(0.0, step).__next__


def test_every_bucket_is_timed_and_written_at_once(idle_machine: None):
    with cpu_toy() as (tuned, clock):
        found = tune_series(asked(tuned, 4, 4000), 60)
        assert found.doubt is None and len(found.timed) == 2 and found.changed == 2 and not found.unclear
        assert tuned.explain(Problem(4)).config == tuned.explain(Problem(4000)).config == Size(16)
        assert tuned.explain(Problem(4)).origin == "user"
        assert len(clock.timed) <= 2 * (4 + 4 + 2 * FEWEST_PAIRS), "calls take seconds by its clock: few are made"


def test_the_budget_ends_it_between_problems(idle_machine: None):
    with cpu_toy() as (tuned, _):
        found = tune_series(asked(tuned, 4, 4000), 1.0, slow_clock(0.8))
        assert len(found.timed) == 1 and found.left_out == 1
        assert tuned.explain(Problem(4)).origin == "user" and tuned.explain(Problem(4000)).origin == "heuristic"


def test_a_busy_machine_ends_it_and_nothing_is_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CpuClock, "watch", lambda self: lambda: "other processes used 40% of the cores")
    with cpu_toy() as (tuned, _):
        found = tune_series(asked(tuned, 4, 4000), 60, slow_clock(0.15))
        assert found.doubt == "other processes used 40% of the cores"
        assert len(found.timed) == 1, "the second is not begun"
        assert not tables.user_tables() and tuned.explain(Problem(4)).origin == "heuristic"


def test_times_that_spread_decide_nothing_and_leave_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CpuClock, "watch", lambda self: lambda: None)
    uneven = itertools.cycle((1.0, 9.0, 3.0, 0.5))
    with cpu_toy(seconds_of=lambda size: next(uneven) * (1 if size.block < 64 else 40)) as (tuned, _):
        found = tune_series(asked(tuned, 4), 60)
        assert [reason for _, reason in found.unclear] and "spread" in found.unclear[0][1]
        assert tuned.explain(Problem(4)).origin == "heuristic"


def test_what_cannot_be_tried_is_told(idle_machine: None):
    def fail() -> Any:
        raise MemoryError("no room")

    with cpu_toy() as (tuned, _):
        found = tune_series([Asked(tuned, Problem(4), fail), *asked(tuned, 4000)], 60)
        assert found.unclear[0][1] == "MemoryError: no room" and len(found.timed) == 1


def test_the_limit_of_a_tunable_decides_what_replaces_the_first(idle_machine: None):
    with cpu_toy(candidates=(Size(64), Size(60))) as (tuned, _):
        assert tune_series(asked(tuned, 4), 60).changed == 1
    with cpu_toy(candidates=(Size(64), Size(60))) as (tuned, _):
        object.__setattr__(tuned, "limit", lambda first, seconds: 0.9 * seconds)
        found = tune_series(asked(tuned, 4), 60)
        assert found.changed == 0 and tuned.explain(Problem(4)).config == Size(64)
