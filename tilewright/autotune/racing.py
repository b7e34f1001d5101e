"""Finding the fastest of many candidates without timing all of them well.

Every candidate is timed a little, those that are clearly slower drop out, the rest are timed more. The first candidate,
the one that would be used without tuning, stays in to the end: what wins has beaten it side by side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Of each round: how often a candidate is timed, and by how much it may be slower than the best to stay.
ROUNDS = ((3, 1.5), (7, 1.15), (15, 1.05), (30, 1.0))
#: What beats the first candidate by less than this is noise.
MARGIN = 0.97
#: Calls of each side of a duel, and in how large a share of the pairs the winner must have been faster.
PAIRS, LEAST_WON = 15, 0.75
#: The distance of the quartiles of one side's times, as a share of their median, from which on they say nothing.
MOST_SPREAD = 0.5


def noise(first: Any, seconds: float) -> float:
    """Seconds that a candidate must not exceed to replace ``first``, which takes so many: its gain is no noise."""
    return MARGIN * seconds


@dataclass
class Race:
    """medians: seconds of those that were timed, from their last round. failed: candidate -> what went wrong. left_out:
    not timed, for want of time. finalists: how many reached the last round that was run.
    """

    medians: dict[Any, float] = field(default_factory=dict)
    failed: dict[Any, str] = field(default_factory=dict)
    left_out: list[Any] = field(default_factory=list)
    finalists: list[Any] = field(default_factory=list)

    def winner(self, first: Any, limit: Callable[[Any, float], float] | None = None) -> Any | None:
        """The fastest finalist, but ``first`` unless it was beaten clearly; None if nothing worked. limit: from
        ``first`` and its seconds to those that another must not exceed; by default less by what is noise.
        """
        timed = [candidate for candidate in self.finalists if candidate in self.medians]
        if not timed:
            return None
        best = min(timed, key=lambda candidate: self.medians[candidate])
        if first in self.medians and self.medians[best] > (limit or noise)(first, self.medians[first]):
            return first
        return best


def race(
    candidates: Sequence[Hashable],
    measure: Callable[[Any, int], list[float]],
    budget: float,
    progress: Callable[[int, int], None] | None = None,
    now: Callable[[], float] = time.monotonic,
    rounds: Sequence[tuple[int, float]] | None = None,
) -> Race:
    """Race ``candidates``, of which the first is the one to beat.

    measure: seconds of that many calls of a candidate; what it raises disqualifies the candidate. budget: seconds in
    all, after which what is known decides. progress: called with (candidates done, of how many) in the first round.
    rounds: by default ``ROUNDS``.
    """
    found = Race()
    start = now()
    left = list(candidates)
    for number, (repeats, tolerance) in enumerate(rounds or ROUNDS):
        timed: list[Any] = []
        medians: dict[Any, float] = {}
        for place, candidate in enumerate(left):
            # The one to beat is timed in any case: without it nothing can be said of the others.
            if now() - start > budget and timed:
                break
            try:
                medians[candidate] = statistics.median(measure(candidate, repeats))
                timed.append(candidate)
            except Exception as error:  # a compiler, a driver or a launch may fail in any way
                found.failed[candidate] = f"{type(error).__name__}: {error}"[:500]
                found.medians.pop(candidate, None)
            if progress is not None and number == 0:
                progress(place + 1, len(left))
        if number == 0:
            found.left_out = [c for c in left if c not in timed and c not in found.failed]
        complete = len(timed) + sum(c in found.failed for c in left) == len(left)
        if complete or number == 0:
            # Medians of one round only are compared with each other: clocks drift.
            found.medians.update(medians)
            found.finalists = timed
        if not complete or len(timed) < 2:
            break
        best = min(medians.values())
        left = [c for c in timed if c == candidates[0] or medians[c] <= best * tolerance]
        if len(left) < 2:
            break
    return found


@dataclass(frozen=True)
class Duel:
    """Seconds of calls of the one to beat and of another, in pairs."""

    first: tuple[float, ...]
    other: tuple[float, ...]

    @property
    def doubt(self) -> str | None:
        """Why these times say nothing, or None."""
        for times in (self.first, self.other):
            low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
            if high - low > MOST_SPREAD * middle:
                return f"times of one candidate spread by {(high - low) / middle:.0%}"
        return None

    def won(self, limit: Callable[[float], float]) -> bool:
        """Whether the other one is faster in most pairs, and its median does not exceed the limit for that of the
        first.
        """
        ahead = sum(other < first for first, other in zip(self.first, self.other, strict=True))
        return ahead >= LEAST_WON * len(self.first) and statistics.median(self.other) <= limit(
            statistics.median(self.first)
        )


def duel(
    first: Hashable, other: Hashable, measure: Callable[[Any, int], list[float]], pairs: int | None = None
) -> Duel:
    """Time two candidates in turns, each going first in every other pair. measure: as of ``race``; what it raises is
    raised. pairs: of calls, by default ``PAIRS``.
    """
    times: dict[Any, list[float]] = {first: [], other: []}
    for i in range(pairs or PAIRS):
        for candidate in (first, other) if i % 2 else (other, first):
            times[candidate] += measure(candidate, 1)
    return Duel(tuple(times[first]), tuple(times[other]))
