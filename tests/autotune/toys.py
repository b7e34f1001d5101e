"""A kernel that is none, with a clock that says what the test wants."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tilewright.autotune import TUNABLES, Hooks, Trials, Tunable
from tilewright.autotune.device import DeviceKind

DEVICE = DeviceKind("Toy 9000", "sm_90", 132, "1.2.3")


@dataclass(frozen=True)
class Size:
    block: int
    stages: int = 2


@dataclass(frozen=True)
class Problem:
    m: int
    name: str = "toy"


class ToyClock:
    """Time is what ``seconds_of`` says of the config that ran last."""

    def __init__(self, seconds_of: Callable[[Size], float]) -> None:
        self.seconds_of = seconds_of
        self.ran: list[Size] = []
        self.timed: list[Size] = []
        self.disturbance: str | None = None

    def prepare(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run

    def watch(self) -> Callable[[], str | None]:
        return lambda: self.disturbance

    def seconds(self, prepared: Callable[[], Any], count: int) -> list[float]:
        for _ in range(count):
            prepared()
        self.timed.append(self.ran[-1])
        return [self.seconds_of(self.ran[-1])] * count


CANDIDATES = tuple(Size(block) for block in (16, 32, 64, 128))
_number = itertools.count()


@contextlib.contextmanager
def toy(
    seconds_of: Callable[[Size], float] = lambda size: float(size.block),
    *,
    heuristic: Callable[[Problem], Size] = lambda problem: Size(64),
    candidates: tuple[Size, ...] = CANDIDATES,
    why_not: Callable[[Size, Problem], str | None] = lambda size, problem: None,
    result: Callable[[Size], Any] = lambda size: 0,
    device: DeviceKind = DEVICE,
    name: str = "",
) -> Iterator[tuple[Tunable, ToyClock]]:
    """A tunable that is registered while the block runs. result: 0 is right, anything else wrong."""
    clock = ToyClock(seconds_of)

    def run(size: Size) -> Any:
        clock.ran.append(size)
        return result(size)

    hooks = Hooks(
        facts=lambda problem: {"m": 16 if problem.m <= 16 else 4096},
        representative=lambda problem: replace(problem, m=16 if problem.m <= 16 else 4096),
        device=lambda problem: device,
        trials=lambda tunable, problem: Trials(run, lambda found: f"got {found}" if found else None, clock),
    )
    made = Tunable(
        name or f"toy{next(_number)}", heuristic, lambda problem: candidates, hooks, ("tests.autotune.toys",), why_not
    )
    try:
        yield made, clock
    finally:
        del TUNABLES[made.name]
