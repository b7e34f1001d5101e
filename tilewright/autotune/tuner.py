"""Timing the candidates for one problem and writing down the fastest."""

from __future__ import annotations

import datetime
import functools
import logging
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.autotune import modes, tables
from tilewright.autotune.racing import Race, duel, race
from tilewright.autotune.shortlist import shipped
from tilewright.autotune.space import Trials, Tunable, tune_with
from tilewright.autotune.store import Entry

logger = logging.getLogger("tilewright")
#: What a first use may cost, beside compiling the first candidate; on a CPU, beside repacking its weight.
FIRST_USE_SECONDS, FIRST_USE_SECONDS_CPU = 20.0, 0.25
#: Two tunings at once would time each other.
one_at_a_time = threading.RLock()


@dataclass(frozen=True)
class Outcome:
    """What tuning a problem found. config: the fastest, None if nothing could be timed. seconds: by candidate. failed:
    candidates that could not run, or gave a wrong result, with what happened; refused: by a constraint. left_out: for
    want of time. reason: why nothing was done.
    """

    config: Any | None
    heuristic: Any
    seconds: Mapping[Any, float]
    failed: Mapping[Any, str]
    refused: Mapping[Any, str]
    left_out: Sequence[Any] = ()
    reason: str = ""

    @property
    def speedup(self) -> float | None:
        """Over the heuristic's configuration, if both were timed."""
        if self.config not in self.seconds or self.heuristic not in self.seconds:
            return None
        return self.seconds[self.heuristic] / self.seconds[self.config]

    def words(self) -> list[str]:
        """Why there is no configuration."""
        return [self.reason] if self.reason else [f"{config}: {error}" for config, error in self.failed.items()]


def tune(
    tunable: Tunable,
    problem: Any,
    budget: float,
    *,
    candidates: Sequence[Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    save: bool = True,
) -> Outcome:
    """Race the configurations of ``tunable`` for the bucket of ``problem`` and remember the fastest.

    budget: seconds. candidates: a short list instead of the whole space, in the order of the race; the heuristic's
    comes first. Default: the list that comes with the package, if there is one for the chip, the problem and the kernel
    as it is, else the whole space. On a CPU, which other processes share, the fastest must win a duel in turns with the
    heuristic's; where others used much of the cores meanwhile, or times spread, there is no configuration but the
    reason, and nothing is remembered. Never raises for a candidate's sake: what fails is recorded with its error and
    cannot win. During CUDA-graph capture nothing is run and nothing remembered.
    """
    sample = tunable.hooks.representative(problem)
    heuristic = tunable.heuristic(sample)
    serving, refused = tunable.split_candidates(sample)
    if candidates is None:
        short = shipped(tunable.hooks.device(problem).arch)
        candidates = None if short is None else short.candidates(tunable, sample)
    if candidates is not None:
        able = set(serving)
        first = [heuristic] if heuristic in able else []
        serving = list(dict.fromkeys([*first, *(c for c in candidates if c in able)]))
    reason = modes.why_not_now()
    if reason is None and not serving:
        reason = "no configuration serves the problem"
    if reason is not None:
        return Outcome(None, heuristic, {}, {}, refused, reason=reason)
    with one_at_a_time:
        try:
            trials = tunable.hooks.trials(tunable, sample)
        except Exception as error:  # out of memory, for one
            logger.warning("%s cannot be tuned: %s", tunable.name, error)
            return Outcome(None, heuristic, {}, {}, refused, reason=f"{type(error).__name__}: {error}")
        disturbed = trials.clock.watch()
        measure = measuring(trials)
        found = race(serving, measure, budget, progress)
        winner, doubt = found.winner(serving[0], tunable.limit), None
        if tunable.hooks.device(problem).is_cpu:
            winner, doubt = confirmed(tunable, found, winner, serving[0], measure)
            doubt = disturbed() or doubt
    if doubt is not None:
        winner, doubt = None, f"the machine is busy ({doubt}): nothing was written"
    outcome = Outcome(winner, heuristic, found.medians, found.failed, refused, found.left_out, doubt or "")
    for config, words in found.failed.items():
        logger.warning("%s: %s failed in tuning: %s", tunable.name, tunable.encode(config), words)
    if winner is not None and save:
        tables.remember(tunable.hooks.device(problem), dict([entry_of(tunable, problem, outcome)]))
    return outcome


def entry_of(tunable: Tunable, problem: Any, outcome: Outcome) -> tuple[str, Entry]:
    """Under which key a table keeps an outcome that has a configuration, and what it keeps."""
    driver = tunable.hooks.device(problem).driver
    key = tables.key_of(tunable.name, tunable.hooks.facts(problem), driver, tunable.source())
    return key, _entry(tunable, outcome)


def measuring(trials: Trials) -> Callable[[Any, int], list[float]]:
    """Seconds of so many calls of a candidate, whose result is checked before it is timed."""
    prepared: dict[Any, Callable[[], Any]] = {}

    def measure(config: Any, count: int) -> list[float]:
        if config not in prepared:
            wrong = trials.check(trials.run(config))
            if wrong is not None:
                raise ValueError(f"wrong result: {wrong}")
            prepared[config] = trials.clock.prepare(lambda: trials.run(config))
        return trials.clock.seconds(prepared[config], count)

    return measure


def confirmed(
    tunable: Tunable,
    found: Race,
    winner: Any | None,
    first: Any,
    measure: Callable[[Any, int], list[float]],
    pairs: int | None = None,
) -> tuple[Any | None, str | None]:
    """The winner of a race if it beats the first candidate in turns, too, else that one; and why times say nothing. The
    times of ``found`` become those of the duel.
    """
    if winner is None or winner == first or first not in found.medians:
        return winner, None
    try:
        both = duel(first, winner, measure, pairs)
    except Exception as error:  # as in the race
        found.failed[winner] = f"{type(error).__name__}: {error}"[:500]
        return first, None
    found.medians.update({first: statistics.median(both.first), winner: statistics.median(both.other)})
    won = both.won(functools.partial(tunable.limit, first))
    return (winner if won else first), both.doubt


def _entry(tunable: Tunable, outcome: Outcome) -> dict[str, Any]:
    """What the table keeps: the configuration, and how it was found."""

    def displayed(seconds: float | None) -> float | None:
        return None if seconds is None else round(1e6 * seconds, 3)

    return {
        "config": tunable.encode(outcome.config),
        "microseconds": displayed(outcome.seconds.get(outcome.config)),
        "heuristic": tunable.encode(outcome.heuristic),
        "heuristic_microseconds": displayed(outcome.seconds.get(outcome.heuristic)),
        "timed": len(outcome.seconds),
        "left_out": len(outcome.left_out),
        "failed": [
            {"config": tunable.encode(config), "error": error[:200]} for config, error in outcome.failed.items()
        ][:20],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _tune_first_use(tunable: Tunable, problem: Any) -> Outcome:
    on_cpu = tunable.hooks.device(problem).is_cpu
    return tune(tunable, problem, budget=FIRST_USE_SECONDS_CPU if on_cpu else FIRST_USE_SECONDS)


tune_with(_tune_first_use)
