"""Timing one function as a model would run it: with operands that are not in the cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """prepare: what to call for a function, once, before it is timed. seconds: the times of ``count`` calls."""

    def prepare(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Warm ``run`` up and return what ``seconds`` takes for it."""

    def seconds(self, prepared: Callable[[], Any], count: int) -> list[float]:
        """Time ``count`` calls, each by itself."""


class CpuClock:
    """Wall time. The function itself rotates ``copies`` of its operands, so that they do not stay in the cache."""

    def __init__(self, copies: int = 1) -> None:
        self.copies = copies

    def prepare(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A call with each copy, which repacks its weights."""
        for _ in range(self.copies):
            run()
        return run

    def seconds(self, prepared: Callable[[], Any], count: int) -> list[float]:
        """Times of single calls."""
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            prepared()
            times.append(time.perf_counter() - begin)
        return times


class GpuClock:
    """CUDA events around a graph replay, so that the host's share is not in the time, after a write of twice the L2
    cache, so that operands come from memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = 2 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
        self.flush = torch.empty(size, dtype=torch.uint8, device=device)

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
            with torch.cuda.graph(graph):
                run()
        return graph.replay

    def seconds(self, prepared: Callable[[], Any], count: int) -> list[float]:
        """Times of single replays, caches cold."""
        times = []
        with torch.cuda.device(self.device):
            for _ in range(count):
                self.flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                prepared()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
        return times


def clock_for(device: torch.device, copies: int = 1) -> Clock:
    """The clock of a device, for a function that rotates so many copies of its operands."""
    return GpuClock(device) if device.type == "cuda" else CpuClock(copies)
