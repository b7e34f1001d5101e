"""Steps of a network for the C kernels that work on rows: products, normalisation, attention, single numbers.

Each is a ``Description`` whose ``job`` points to a structure of its kernel. What is written into it are addresses: the
caller keeps the tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from tilewright.kernels.cpu import steps
from tilewright.kernels.cpu.attention import Job
from tilewright.kernels.cpu.steps import Description


class Int8Step(ctypes.Structure):
    """``int8_step`` of int8_linear.c: of INT8_QUANTIZE and INT8_PRODUCT."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "correction", "weight_scale", "bias", "channel_scale")),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "y", "q", "scale")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "x_stride")),
        *((name, ctypes.c_int32) for name in ("dtype", "activation")),
    ]


class Int4Step(ctypes.Structure):
    """``int4_step`` of int4_int8_linear.c: of INT4_QUANTIZE and INT4_PRODUCT."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "zero", "scale", "bias", "channel_scale")),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "y", "q", "q_sums", "row_scale")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "x_stride", "group")),
        *((name, ctypes.c_int32) for name in ("dtype", "activation")),
    ]


class WeightOnlyStep(ctypes.Structure):
    """``weight_only_step`` of weight_only.c: of WEIGHT_ONLY_CONVERT and WEIGHT_ONLY_PRODUCT."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "zero", "scale", "bias")),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "y", "rows", "row_sums")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "x_stride", "group")),
        *((name, ctypes.c_int32) for name in ("bits", "dtype", "compute", "activation")),
    ]


class ElementwiseStep(ctypes.Structure):
    """``elementwise_step`` of elementwise.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "y")),
        *((name, ctypes.c_int64 * 4) for name in ("size", "a_stride", "b_stride", "y_stride")),
        ("scalar", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("operation", "alone")),
    ]


class NormStep(ctypes.Structure):
    """``norm_step`` of norm.c: of NORM and RMS_NORM."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "bias", "channel_scale")),
        *((name, ctypes.c_void_p) for name in ("sum", "y", "q", "scale")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "x_stride", "r_stride")),
        ("epsilon", ctypes.c_float),
        ("lanes", ctypes.c_int32),
    ]


#: The kinds of steps that have a job, with its structure.
JOBS: dict[int, type[ctypes.Structure]] = {
    steps.INT8_QUANTIZE: Int8Step,
    steps.INT8_PRODUCT: Int8Step,
    steps.ATTENTION: Job,
    steps.NORM: NormStep,
    steps.INT4_QUANTIZE: Int4Step,
    steps.INT4_PRODUCT: Int4Step,
    steps.WEIGHT_ONLY_CONVERT: WeightOnlyStep,
    steps.WEIGHT_ONLY_PRODUCT: WeightOnlyStep,
    steps.RMS_NORM: NormStep,
    steps.ELEMENTWISE: ElementwiseStep,
}
#: Steps whose rows are shared among the threads, with the member that says how many rows there are.
_BY_ROWS = {
    steps.INT8_QUANTIZE: "m",
    steps.INT4_QUANTIZE: "m",
    steps.WEIGHT_ONLY_CONVERT: "m",
    steps.NORM: "rows",
    steps.RMS_NORM: "rows",
}


def describe(kind: int, job: ctypes.Structure, *, independent: bool = False) -> Description:
    """The step of that kind which does ``job``. independent: the threads need not wait for the step before."""
    d = Description(kind=kind, job=ctypes.addressof(job), independent=independent)
    d.described = job
    return d


def one_thread_does(description: Description) -> bool:
    """Whether the last thread does all of the step, so that it need not wait for another such step before it."""
    job = description.described
    if isinstance(job, ElementwiseStep):
        return bool(job.alone)
    return description.kind in _BY_ROWS and getattr(job, _BY_ROWS[description.kind]) == 1


def pointers_of(description: Description) -> list[tuple[ctypes.Structure, str, int]]:
    """Every address of a tensor in a step: the structure and the member that it stands in, and the address."""
    found = []
    for structure in (description, description.described):
        if structure is not None:
            members = _members(structure)
            names = (name for name, kind in members if kind is ctypes.c_void_p and name not in ("job", "count"))
            found += [(structure, name, getattr(structure, name)) for name in names if getattr(structure, name)]
    return found


def requantize(description: Description) -> Description | None:
    """The step that writes the quantised rows anew which this one has written beside its result, if it has."""
    norm = description.described
    if not isinstance(norm, NormStep) or not norm.q:
        return None
    size = {"m": norm.rows, "k": norm.columns, "x_stride": norm.columns}
    return describe(
        steps.INT8_QUANTIZE, Int8Step(x=norm.y, channel_scale=norm.channel_scale, q=norm.q, scale=norm.scale, **size)
    )


def _members(structure: ctypes.Structure) -> Sequence[tuple[str, type]]:
    return structure._fields_  # type: ignore[return-value]
