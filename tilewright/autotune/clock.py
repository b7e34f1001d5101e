"""Timing one function as a model would run it: with operands that are not in the cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tilewright.autotune.busy import Busy


class Clock(Protocol):
    """prepare: what to call for a function, once, before it is timed. seconds: the times of ``count`` calls."""

    def prepare(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Warm ``run`` up and return what ``seconds`` takes for it."""

    def seconds(self, prepared: Callable[[], Any], count: int) -> list[float]:
        """Time ``count`` calls, each by itself."""

    def watch(self) -> Callable[[], str | None]:
        """Watch the machine from now on: what this returns says what makes times taken since then worth nothing."""


#: Of all cores, what other processes may use while something is timed.
MOST_BUSY = 0.1


class CpuClock:
    """Wall time. The function itself rotates ``copies`` of its operands, so that they do not stay in the cache."""

    def __init__(self, copies: int = 1) -> None:
        self.copies = copies

    def prepare(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A call with each copy, which repacks its weights."""
        for _ in range(self.copies):
            run()
        return run

    def watch(self) -> Callable[[], str | None]:
        """See ``Clock``: whether other processes used much of the cores."""
        busy = Busy()

        def disturbed() -> str | None:
            share = busy.share()
            return f"other processes used {share:.0%} of the cores" if share is not None and share > MOST_BUSY else None

        return disturbed

    def seconds(self, prepared: Callable[[], Any], count: int) -> list[float]:
        """Times of single calls."""
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            prepared()
            times.append(time.perf_counter() - begin)
        return times


@dataclass(frozen=True)
class _Replay:
    """A captured call. start, end: events that the graph itself records; None where a graph cannot time itself."""

    graph: torch.cuda.CUDAGraph
    start: torch.cuda.Event | None = None
    end: torch.cuda.Event | None = None

    def __call__(self) -> None:
        self.graph.replay()


class GpuClock:
    """The time between two events inside a CUDA graph: neither the host nor the launch of the graph has a share in it
    (9 microseconds on an H200, half of what a small layer took). Operands come from memory: before each replay, twice
    the bytes of the L2 cache are read. To write them would leave lines that have to go back to memory while the call
    is timed.

    On AMD a graph cannot time itself, and the events are around its launch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = 2 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
        self.evicting = torch.zeros(size // 4, dtype=torch.int32, device=device)

    def prepare(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Call ``run`` three times, which compiles and repacks, then capture it on a stream of its own."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            if torch.version.hip is not None:
                with torch.cuda.graph(graph):
                    run()
                return _Replay(graph)
            start, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
            with torch.cuda.graph(graph):
                start.record()
                run()
                end.record()
        return _Replay(graph, start, end)

    def watch(self) -> Callable[[], str | None]:
        """See ``Clock``: nothing is known to disturb a GPU."""
        return lambda: None

    def seconds(self, prepared: Callable[[], Any], count: int) -> list[float]:
        """Times of single calls, caches cold; of a function that was not prepared with the time its launches take."""
        times = []
        with torch.cuda.device(self.device):
            for _ in range(count):
                self.evicting.amax()
                if isinstance(prepared, _Replay) and prepared.start is not None and prepared.end is not None:
                    prepared()
                    start, end = prepared.start, prepared.end
                else:
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    prepared()
                    end.record()
                torch.cuda.current_stream().synchronize()
                times.append(start.elapsed_time(end) / 1e3)
        return times


def clock_for(device: torch.device, copies: int = 1) -> Clock:
    """The clock of a device, for a function that rotates so many copies of its operands."""
    return GpuClock(device) if device.type == "cuda" else CpuClock(copies)
