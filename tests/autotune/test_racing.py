"""Racing: who is dropped, who is timed well, what the budget does."""

from __future__ import annotations

import itertools

from tilewright.autotune.racing import MARGIN, PAIRS, ROUNDS, duel, race


def counted(times: dict[str, float]):
    calls: dict[str, int] = dict.fromkeys(times, 0)

    def measure(name: str, count: int) -> list[float]:
        calls[name] += count
        return [times[name]] * count

    return measure, calls


def test_the_fastest_wins_and_the_slow_are_timed_once():
    measure, calls = counted({"first": 1.0, "slow": 9.0, "fast": 0.5, "close": 0.51})
    found = race(["first", "slow", "fast", "close"], measure, budget=1e9)
    assert found.winner("first") == "fast"
    assert calls["slow"] == ROUNDS[0][0]
    assert calls["first"] == calls["fast"] == calls["close"] == sum(count for count, _ in ROUNDS)
    assert not found.left_out and not found.failed


def test_what_beats_the_first_by_noise_alone_does_not_win():
    for share, winner in ((MARGIN + 0.01, "first"), (MARGIN - 0.01, "other")):
        measure, _ = counted({"first": 1.0, "other": share})
        assert race(["first", "other"], measure, budget=1e9).winner("first") == winner


def test_a_failing_candidate_is_recorded_and_cannot_win():
    def measure(name: str, count: int) -> list[float]:
        if name == "broken":
            raise RuntimeError("out of resource: shared memory")
        return [2.0 if name == "first" else 1.0] * count

    found = race(["first", "broken", "good"], measure, budget=1e9)
    assert found.winner("first") == "good"
    assert found.failed == {"broken": "RuntimeError: out of resource: shared memory"}
    assert "broken" not in found.medians


def test_one_that_fails_late_loses_what_it_had():
    calls = itertools.count()

    def measure(name: str, count: int) -> list[float]:
        if name == "flaky" and next(calls) == 1:
            raise RuntimeError("an illegal memory access")
        return [0.1 if name == "flaky" else 1.0] * count

    found = race(["first", "flaky", "third"], measure, budget=1e9)
    assert found.winner("first") == "first" and "flaky" in found.failed and "flaky" not in found.medians


def test_nothing_works():
    def measure(name: str, count: int) -> list[float]:
        raise RuntimeError("no")

    assert race(["first", "other"], measure, budget=1e9).winner("first") is None


def test_the_budget_ends_the_race_and_the_rest_is_left_out():
    clock = itertools.count()
    measure, calls = counted({name: float(i) for i, name in enumerate("abcdefgh", 1)})
    found = race(list("hgfedcba"), measure, budget=3.5, now=lambda: float(next(clock)))
    assert found.left_out == list("edcba")
    assert found.winner("h") == "f"
    assert calls["a"] == 0


def test_an_interrupted_round_does_not_decide():
    clock = itertools.count()
    times = {"first": [1.0, 1.0], "a": [0.9, 0.2], "b": [0.8, 0.8]}

    def measure(name: str, count: int) -> list[float]:
        return [times[name].pop(0)] * count

    # The budget ends in the second round, when "a" was timed anew and "b" was not.
    found = race(["first", "a", "b"], measure, budget=5.5, now=lambda: float(next(clock)))
    assert found.winner("first") == "b"
    assert found.medians == {"first": 1.0, "a": 0.9, "b": 0.8}


def test_progress_is_told():
    seen = []
    measure, _ = counted({"first": 1.0, "b": 2.0})
    race(["first", "b"], measure, budget=1e9, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_a_duel_is_in_turns_and_won_by_more_than_noise():
    measure, calls = counted({"first": 1.0, "other": 0.5})
    both = duel("first", "other", measure)
    assert calls == {"first": PAIRS, "other": PAIRS}
    assert both.won(lambda first: MARGIN * first) and both.doubt is None
    for share, won in ((MARGIN + 0.01, False), (MARGIN - 0.01, True), (1.5, False)):
        both = duel("first", "other", counted({"first": 1.0, "other": share})[0])
        assert both.won(lambda first: MARGIN * first) == won
    assert not duel("first", "other", counted({"first": 1.0, "other": 0.8})[0], 5).won(lambda first: 0.7 * first)


def test_a_duel_that_a_few_long_calls_decide_is_not_won():
    times = itertools.cycle([400.0, 1.0, 1.0, 1.0])
    both = duel("first", "other", lambda name, count: [next(times) if name == "first" else 1.0])
    assert not both.won(lambda first: first)


def test_times_that_spread_say_nothing():
    times = itertools.cycle([1.0, 2.0, 3.0])
    both = duel("first", "other", lambda name, count: [next(times) if name == "first" else 0.1])
    assert both.doubt == "times of one candidate spread by 100%"
