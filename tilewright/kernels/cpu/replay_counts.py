"""What each step of a replay takes: counters that the C kernels fill where somebody asks (``tw_count``, program.h)."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from tilewright.kernels.cpu import steps
from tilewright.kernels.cpu.attention import Job
from tilewright.kernels.cpu.recording import Call, tensors_in
from tilewright.kernels.cpu.replay_memory import storage_key
from tilewright.kernels.cpu.row_steps import Int4Step, Int8Step, NormStep, WeightOnlyStep
from tilewright.kernels.cpu.steps import Description

_NAMES = {
    steps.MAX_POOL: "max pool",
    steps.MEAN: "mean",
    steps.ADD: "add",
    steps.MULTIPLY: "multiply",
    steps.CONVERT: "convert",
    steps.ACTIVATE: "activate",
    steps.WINOGRAD: "convolution, Winograd",
    steps.MARK: "mark",
    steps.INT8_QUANTIZE: "quantise rows",
    steps.INT8_PRODUCT: "int8 product",
    steps.ATTENTION: "attention",
    steps.NORM: "layer norm",
    steps.INT4_QUANTIZE: "quantise rows by groups",
    steps.INT4_PRODUCT: "int8 x int4 product",
    steps.WEIGHT_ONLY_CONVERT: "convert rows",
    steps.WEIGHT_ONLY_PRODUCT: "weight-only product",
    steps.RMS_NORM: "RMS norm",
    steps.ELEMENTWISE: "elementwise",
    steps.CONV: "convolution",
    steps.DEPTHWISE: "depthwise convolution",
}


class Count(ctypes.Structure):
    """``tw_count`` of program.h. A step that runs together with one before it counts with that one."""

    nanoseconds: int
    calls: int
    _fields_ = [("nanoseconds", ctypes.c_int64), ("calls", ctypes.c_int64)]


class _Part(Protocol):
    """Of ``replay_plan``, which asks this module."""

    made: list[list[Call]]
    groups: list[int]
    function: Callable[[], None] | None


class _Counted(Protocol):
    """Likewise: a replay."""

    array: Any
    lock: threading.Lock
    parts: Any
    cached: Any


@contextlib.contextmanager
def counted(replay: _Counted) -> Iterator[ctypes.Array[Count]]:
    """The counters of the steps of ``replay``, in their order, which count while this is open.

    Raises RuntimeError if they are counted already.
    """
    counts = (Count * len(replay.array))()
    with replay.lock:
        if any(step.count for step in replay.array):
            raise RuntimeError("the steps of this program are counted already")
        for step, count in zip(replay.array, counts, strict=True):
            step.count = ctypes.addressof(count)
    try:
        yield counts
    finally:
        with replay.lock:
            for step in replay.array:
                step.count = None


def steps_of(replay: _Counted) -> list[Description]:
    """The steps of ``replay`` in the order of its counters."""
    found: list[Description] = []
    for number, part in enumerate(replay.parts):
        found += part.steps
        if number == 0 and replay.cached is not None:
            found.append(replay.cached.step)
    return found


def storages_read(parts: Sequence[_Part], attends: bool) -> list[set[int]]:
    """Of each step of the C calls: storages of what the calls were given that it is made of.

    attends: whether the attention to a cache is a step, which is made of no such call, behind those of the first C
    call.
    """
    found: list[set[int]] = []
    for part in parts:
        if part.function is not None:
            if attends:
                found.append(set())
                attends = False
            continue
        for group, number in zip(part.groups, range(len(part.made)), strict=True):
            # Steps that prepare something come before the one whose results are those of the call.
            last = next((i for i in range(number, len(part.made)) if part.made[i]), number)
            calls = part.made[last] if last < len(part.groups) and part.groups[last] == group else []
            given = [tensor for call in calls for tensor in tensors_in((call.args, call.kwargs))]
            found.append({storage_key(tensor) for tensor in given})
    return found


def described(step: Description) -> str:
    """What a step does, with its sizes: pixels or rows, and channels."""
    name, job = _NAMES[step.kind], step.described
    if step.kind in (steps.CONV, steps.WINOGRAD, steps.DEPTHWISE):
        window = f"{step.kernel_height} x {step.kernel_width} / {step.stride_height}"
        images = f"{step.batch} x {step.out_height} x {step.out_width}"
        return f"{name} {window}, {step.channels} to {step.out_channels}, {images}"
    if isinstance(job, (Int8Step, Int4Step, WeightOnlyStep)):
        return f"{name} {job.m} x {job.k}{f' by {job.n}' if job.n else ''}"
    if isinstance(job, NormStep):
        return f"{name} {job.rows} x {job.columns}"
    if isinstance(job, Job):
        return f"{name} {job.batch} x {job.heads} x {job.queries}"
    return f"{name} {step.batch} x {step.height} x {step.width} x {step.channels}" if job is None else name
