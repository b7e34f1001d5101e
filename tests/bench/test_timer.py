"""The timer of the tables, by a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import timer
from bench.timer import Busy, Timing, interleaved


class Machine:
    """Calls that take as long as they are told to, and write down their turns."""

    def __init__(self) -> None:
        self.now = 0.0
        self.called: list[str] = []

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.called.append(name)
            self.now += seconds

        return run

    def clock(self) -> float:
        return self.now


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_calls_take_turns_and_what_wakes_does_not_count(machine: Machine):
    calls = {"a": machine.call("a", 1.0), "b": machine.call("b", 3.0)}
    wake = {"a": machine.call("wake a", 9.0), "b": machine.call("wake b", 9.0)}
    found = interleaved(calls, rounds=3, waking=2, wake=wake, clock=machine.clock)
    assert machine.called == ["wake a", "wake a", "a", "wake b", "wake b", "b"] * 4, "the first round does not count"
    assert found.medians() == {"a": 1.0, "b": 3.0}
    assert len(found.times["a"].seconds) == 3


def test_it_goes_on_until_the_time_is_over_and_the_rounds_are_done(machine: Machine):
    calls = {"a": machine.call("a", 1.0)}
    assert len(interleaved(calls, rounds=2, seconds=10, waking=0, clock=machine.clock).times["a"].seconds) == 10
    assert len(interleaved(calls, rounds=20, seconds=10, waking=0, clock=machine.clock).times["a"].seconds) == 20


def test_a_turn_of_short_calls_is_a_series(machine: Machine):
    calls = {"short": machine.call("s", 1.0), "long": machine.call("l", 10.0)}
    interleaved(calls, rounds=1, turn=4.0, waking=0, clock=machine.clock)
    assert "".join(machine.called) == "ssssl" * 2


def test_each_round_has_an_order_of_its_own(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timer.random, "shuffle", lambda names: names.reverse())
    interleaved({n: machine.call(n, 1.0) for n in "ab"}, rounds=3, waking=0, shuffle=True, clock=machine.clock)
    assert "".join(machine.called) == "ab" + "ba" + "ab" + "ba"


def test_at_rest_it_waits_before_each_turn(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timer, "until_idle", machine.call("rest", 5.0))
    found = interleaved({n: machine.call(n, 1.0) for n in "ab"}, rounds=1, rest=True, clock=machine.clock)
    assert machine.called == ["rest", "a", "a", "rest", "b", "b"] * 2
    assert found.medians() == {"a": 1.0, "b": 1.0}


def test_medians_and_quartiles():
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (timing.median, timing.quartiles, timing.spread) == (3.0, (2.0, 4.0), 2 / 3)
    assert Timing((2.0,)).quartiles == (2.0, 2.0)


def test_what_others_use_of_the_cores(monkeypatch: pytest.MonkeyPatch):
    readings = iter([(10.0, 100.0), (13.0, 106.0), None])
    monkeypatch.setattr(Busy, "_read", lambda self: next(readings))
    busy = Busy()
    assert busy.share() == 0.5
    assert busy.share() is None
