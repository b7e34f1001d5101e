"""Timing the candidates for many problems in a short time, all or nothing: while a model is converted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tilewright.autotune import modes, tables
from tilewright.autotune.clock import CpuClock
from tilewright.autotune.racing import PAIRS, race
from tilewright.autotune.space import Trials, Tunable
from tilewright.autotune.tuner import Outcome, confirmed, entry_of, measuring, one_at_a_time

logger = logging.getLogger("tilewright")
#: Seconds for one problem, or as long as so many pairs of calls take.
SECONDS, FEWEST_PAIRS = 0.02, 5
#: Seconds after which it can be told how busy the machine is: the system counts hundredths.
TELLING = 0.2
#: As ``racing.ROUNDS``: what takes twice the time of the best is called once.
ROUNDS = ((1, 2.0), (3, 1.2))


@dataclass(frozen=True)
class Asked:
    """A problem whose candidates are to be timed. trials: makes what they are tried on."""

    tunable: Tunable
    problem: Any
    trials: Callable[[], Trials]


@dataclass
class Series:
    """What was found. timed: with the outcomes that were written. unclear: problems whose times spread, or of which no
    candidate worked, with the reason. left_out: how many were not reached in time. doubt: why nothing was written,
    whatever was timed. seconds: that it took.
    """

    timed: list[tuple[Asked, Outcome]] = field(default_factory=list)
    unclear: list[tuple[Asked, str]] = field(default_factory=list)
    left_out: int = 0
    doubt: str | None = None
    seconds: float = 0.0

    @property
    def changed(self) -> int:
        """Of how many problems another candidate won than would be used without timing."""
        return sum(outcome.config != outcome.heuristic for _, outcome in self.timed)


def tune_series(asked: Sequence[Asked], budget: float, now: Callable[[], float] = time.monotonic) -> Series:
    """Time the candidates for each of ``asked``, on a CPU, until ``budget`` seconds are over, and remember the fastest:
    as ``tuner.tune``, but ``SECONDS`` for each beside what making and packing its operands takes, and the machine is
    watched all the while: where others use much of it, the series ends and nothing is remembered.
    """
    found, begin = Series(), now()
    found.doubt = modes.why_not_now()
    if found.doubt is not None or not asked:
        return found
    with one_at_a_time:
        disturbed = CpuClock().watch()
        for place, each in enumerate(asked):
            if place and now() - begin > budget:
                found.left_out = len(asked) - place
                break
            if now() - begin > TELLING and disturbed() is not None:
                break
            try:
                outcome = _tune(each)
            except Exception as error:  # out of memory, for one
                logger.info("%s cannot be tuned: %s", each.tunable.name, error)
                found.unclear.append((each, f"{type(error).__name__}: {error}"[:200]))
                continue
            if outcome.config is None:
                found.unclear.append((each, "; ".join(outcome.words())[:200]))
            else:
                found.timed.append((each, outcome))
        found.doubt = disturbed()
    found.seconds = now() - begin
    if found.doubt is None and found.timed:
        entries = dict(entry_of(each.tunable, each.problem, outcome) for each, outcome in found.timed)
        tables.remember(asked[0].tunable.hooks.device(asked[0].problem), entries)
    return found


def _tune(asked: Asked) -> Outcome:
    tunable, sample = asked.tunable, asked.tunable.hooks.representative(asked.problem)
    serving, refused = tunable.split_candidates(sample)
    measure = measuring(asked.trials())
    found = race(serving, measure, SECONDS, rounds=ROUNDS)
    first = serving[0]
    winner, doubt = found.winner(first, tunable.limit), None
    if winner is not None:
        pair = found.medians[winner] + found.medians.get(first, 0.0)
        pairs = min(max(int(SECONDS / max(pair, 1e-9)), FEWEST_PAIRS), PAIRS)
        winner, doubt = confirmed(tunable, found, winner, first, measure, pairs)
    for config, words in found.failed.items():
        logger.info("%s: %s failed in tuning: %s", tunable.name, tunable.encode(config), words)
    if doubt is not None:
        return Outcome(None, first, found.medians, found.failed, refused, found.left_out, doubt)
    return Outcome(winner, first, found.medians, found.failed, refused, found.left_out)
