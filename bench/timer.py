"""The timer of every table on a CPU: calls take turns in one process, and their medians and quartiles are compared.

A machine that slows down slows all of them. What is called must have been found right before.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.idle import separate_cores, until_idle
from tilewright.autotune.busy import Busy

Call = Callable[[], Any]
#: Written before each round where weights are to come from memory: more than a last-level cache holds.
EVICTED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Timing:
    """Seconds of single calls."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the calls took no longer."""
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        """The mean of the fastest quarter: whatever else the machine does only adds to a time."""
        return statistics.fmean(sorted(self.seconds)[: max(1, len(self.seconds) // 4)])

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the calls took no longer than the first, a quarter no less than the second."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """The distance of the quartiles as a share of the median."""
        low, high = self.quartiles
        return (high - low) / self.median


@dataclass(frozen=True)
class Timings:
    """times: by the name of the call. busy: the share of the cores that other processes had meanwhile, if known."""

    times: dict[str, Timing]
    busy: float | None = None

    def medians(self) -> dict[str, float]:
        """Seconds by name."""
        return {name: timing.median for name, timing in self.times.items()}


def interleaved(
    calls: Mapping[str, Call],
    *,
    seconds: float = 0.0,
    rounds: int = 7,
    turn: float = 0.0,
    waking: int = 1,
    wake: Mapping[str, Call] | None = None,
    evict: bool = False,
    rest: bool = False,
    shuffle: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time ``calls`` in turns for ``seconds`` and at least ``rounds`` rounds, after one round that does not count.

    turn: seconds that a turn lasts at least, where single calls are short. waking: calls at the beginning of a turn
    that do not count: they wake the threads and fetch the operands. wake: called for these instead of the call itself,
    as a copy with operands of its own, so that those of the timed call come from memory. evict: write more than the
    cache holds before each round. rest: begin a turn when the threads of the one before are at rest, and keep pools of
    threads apart (``bench.idle``), as needed where calls run on several pools. shuffle: draw the order anew each round.
    """
    evicted = torch.empty(EVICTED_BYTES if evict else 0, dtype=torch.uint8)
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)

    def one_turn(name: str) -> list[float]:
        if rest:
            until_idle()
        call, taken = calls[name], []
        for _ in range(waking):
            (wake or calls)[name]()
        until = clock() + turn
        while True:
            begin = clock()
            call()
            end = clock()
            taken.append(end - begin)
            if end >= until:
                return taken

    for name in names:
        one_turn(name)
    begun, busy = clock(), Busy()
    with separate_cores() if rest else contextlib.nullcontext(lambda: None) as bind:
        while len(times[names[0]]) < rounds or clock() - begun < seconds:
            evicted.add_(1)
            bind()
            if shuffle:
                random.shuffle(names)
            for name in names:
                times[name] += one_turn(name)
    return Timings({name: Timing(tuple(taken)) for name, taken in times.items()}, busy.share())


def block(
    call: Call,
    *,
    seconds: float,
    waking: int = 2,
    fewest: int = 3,
    between: Call | None = None,
    own_clock: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of each call of one turn, as many as fit into ``seconds`` and ``fewest`` at least, after ``waking`` that
    do not count; the threads of this process are at rest when it returns.

    between: done after each call and not timed. own_clock: what ``call`` returns is the time it took.
    """
    taken: list[float] = []
    begun = clock()
    while len(taken) < waking + fewest or clock() - begun < seconds:
        start = clock()
        found = call()
        end = clock()
        taken.append(found if own_clock else end - start)
        if between is not None:
            between()
        if len(taken) == waking:
            begun = clock()
    until_idle()
    return taken[waking:]
