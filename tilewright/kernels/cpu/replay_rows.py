"""From recorded operators on rows to steps of the C kernels, as ``replay_steps`` does for images.

Calls are lowered in groups: products of the same rows, which are quantised once and need not wait for each other; an
addition and the normalisation of its result, which may be written in several operators (``replay_norms``).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tilewright.kernels.cpu import attention, linear, native, norms, steps
from tilewright.kernels.cpu.lowering import Lowering, NotNative, Scratch, place_of, storage_of
from tilewright.kernels.cpu.replay_norms import rms_norm_at
from tilewright.kernels.cpu.row_steps import Int4Step, Int8Step, NormStep, WeightOnlyStep, describe
from tilewright.kernels.cpu.steps import Description
from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.card import card_of
from tilewright.kernels.dispatch.problem import Problem

if TYPE_CHECKING:
    from tilewright.kernels.cpu.recording import Call

_INT8, _INT4 = "tilewright.int8_linear.default", "tilewright.int4_int8_linear.default"
_W4A16, _W8A16 = "tilewright.int4_linear.default", "tilewright.int8_weight_only_linear.default"
_PRODUCTS = (_INT8, _INT4, _W4A16, _W8A16)
_NORM, _ADD = "aten.native_layer_norm.default", "aten.add.Tensor"
_MULTIPLY, _QUANTIZE_MARKED = "aten.mul.Tensor", "tilewright.quantize_per_tensor_marked.default"
#: What the router calls the implementation whose code the steps share.
_C_KERNEL = "C kernel"
#: Sums of products of u8 and s8 must stay below 2^31.
_LARGEST_K = 66_000
#: Columns of a row whose sum fits the scratch memory of program.h.
_MOST_COLUMNS = (768 << 10) // 4


def grouped(calls: Sequence[Call]) -> list[list[Call]]:
    """The calls in order, those that are lowered together in one list."""
    groups: list[list[Call]] = []
    end = 0
    for number, call in enumerate(calls):
        if number < end:
            continue
        if count := rms_norm_at(calls, number):
            groups.append(list(calls[number : number + count]))
            end = number + count
            continue
        last = groups[-1] if groups else []
        if last and (_same_rows(last, call) or _normalises(last, call) or _quantizes_product(last, call)):
            last.append(call)
        else:
            groups.append([call])
    return groups


def _same_rows(last: list[Call], call: Call) -> bool:
    """Whether ``call`` multiplies the rows that those of ``last`` do, and reads nothing that they make."""
    if call.name not in _PRODUCTS or last[0].name != call.name:
        return False
    mine, theirs = (_arguments_of(each.function, each.args, each.kwargs) for each in (call, last[0]))
    if mine.get("residual") is not None or place_of(mine["x"]) != place_of(theirs["x"]):
        return False
    storages = {storage_of(each.result) for each in last}
    return storage_of(mine["x"]) not in storages and storage_of(call.result) not in storages


def _normalises(last: list[Call], call: Call) -> bool:
    if call.name != _NORM or len(last) != 1 or last[0].name != _ADD or last[0].kwargs:
        return False
    a, b = last[0].args[:2]
    same = isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype == torch.float32
    return same and len(last[0].args) == 2 and place_of(call.args[0]) == place_of(last[0].result)


def _quantizes_product(last: list[Call], call: Call) -> bool:
    if call.name != _QUANTIZE_MARKED or len(last) != 1 or last[0].name != _MULTIPLY or last[0].kwargs:
        return False
    return place_of(call.args[0]) == place_of(last[0].result)


def _arguments_of(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of an operator by name."""
    declared = function._schema.arguments
    defaults = {each.name: each.default_value for each in declared if each.has_default_value()}
    return {**defaults, **dict(zip([each.name for each in declared], args, strict=False)), **kwargs}


# ---- products
def _ends(
    plan: Lowering, op: str, given: Mapping[str, Any], result: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The rows that a product reads, and the members that the steps of both formats have."""
    x, residual, activation = given["x"], given["residual"], given["activation"]
    rows, target = plan.rows(x), plan.rows(result)
    (m, k), n = rows.shape, target.shape[1]
    if activation not in native.ACTIVATIONS or k > _LARGEST_K or not target.is_contiguous():
        raise NotNative
    card = card_of(op)
    if card is None or router.route(card.problem(op, given, n)).name != _C_KERNEL:
        raise NotNative  # another implementation is faster, and its last bits are others
    added = None if residual is None else plan.rows(residual)
    if added is not None and (added.shape != target.shape or not added.is_contiguous()):
        raise NotNative
    return rows, {
        "bias": plan.own(given["bias"]),
        "residual": None if added is None else added.data_ptr(),
        "y": target.data_ptr(),
        "m": m,
        "n": n,
        "k": k,
        "activation": native.ACTIVATIONS[activation],
    }


def _int8_linear(plan: Lowering, *args: Any, result: torch.Tensor, **kwargs: Any) -> list[Description]:
    given = _arguments_of(torch.ops.tilewright.int8_linear.default, args, kwargs)
    rows, ends = _ends(plan, "int8_linear", given, result)
    packed, correction = linear.packed_int8(given["weight"])
    plan.kept.append((packed, correction))
    job = Int8Step(
        packed=packed.data_ptr(),
        correction=correction.data_ptr(),
        weight_scale=plan.own(given["weight_scale"]),
        **ends,
    )
    made, (q, scale) = _quantized(plan, given["x"], rows, given["channel_scale"])
    q.use(plan.group, job, "q")
    scale.use(plan.group, job, "scale")
    made.append(describe(steps.INT8_PRODUCT, job, independent=plan.independent and not made))
    return made


def _int4_int8_linear(plan: Lowering, *args: Any, result: torch.Tensor, **kwargs: Any) -> list[Description]:
    given = _arguments_of(torch.ops.tilewright.int4_int8_linear.default, args, kwargs)
    rows, ends = _ends(plan, "int4_int8_linear", given, result)
    (m, k), groups, group_size = rows.shape, given["weight_scale"].shape[1], given["group_size"]
    weight = linear.packed_int4(given["weight_packed"], given["weight_scale"], given["weight_zero"], k)
    plan.kept.append(weight)
    packed, scale, zero = (None if each is None else each.data_ptr() for each in weight)
    job = Int4Step(packed=packed, scale=scale, zero=zero, group=group_size, **ends)
    key = (storage_of(given["x"]), place_of(given["x"]), _INT4, group_size, _address(given["channel_scale"]))
    made, known = [], plan.quantized.get(key)
    if known is None:
        sizes = m * native.function("int4_int8_row_bytes")(k), 4 * m * groups, 4 * m
        known = plan.quantized[key] = tuple(map(plan.reserve, sizes))
        first = Int4Step(x=rows.data_ptr(), m=m, k=k, x_stride=rows.stride(0), group=group_size)
        first.channel_scale = plan.own(given["channel_scale"])
        _use(plan, known, first, _INT4_SCRATCH)
        made.append(describe(steps.INT4_QUANTIZE, first))
    _use(plan, known, job, _INT4_SCRATCH)
    made.append(describe(steps.INT4_PRODUCT, job, independent=plan.independent and not made))
    return made


def _weight_only(op: str) -> Callable[..., list[Description]]:
    """Of ``int4_linear`` or ``int8_weight_only_linear``."""

    def lower(plan: Lowering, *args: Any, result: torch.Tensor, **kwargs: Any) -> list[Description]:
        given = _arguments_of(getattr(torch.ops.tilewright, op).default, args, kwargs)
        rows, ends = _ends(plan, op, given, result)
        (m, k), compute = rows.shape, native.DTYPES[given["compute_dtype"] or torch.float32]
        stored = given["weight_packed" if op == "int4_linear" else "weight"]
        group = given.get("group_size") or k
        packed, scale, zero = linear.packed_weight_only(stored, given["weight_scale"], given.get("weight_zero"), k)
        plan.kept.append((packed, scale, zero))
        weight = {
            "packed": packed.data_ptr(),
            "scale": scale.data_ptr(),
            "zero": _address(linear.zeros_that_count(zero, given.get("weight_zero"))),
            "bits": 4 if zero is not None else 8,
            "group": group,
            "compute": compute,
        }
        job = WeightOnlyStep(**weight, **ends)
        key = (storage_of(given["x"]), place_of(given["x"]), op, group, compute)
        made, known = [], plan.quantized.get(key)
        if known is None:
            known = plan.quantized[key] = tuple(map(plan.reserve, linear.weight_only_scratch(compute, m, m, k, group)))
            first = WeightOnlyStep(**weight, x=rows.data_ptr(), m=m, k=k, x_stride=rows.stride(0))
            _use(plan, known, first, ("rows", "row_sums"))
            made.append(describe(steps.WEIGHT_ONLY_CONVERT, first))
        _use(plan, known, job, ("rows", "row_sums"))
        made.append(describe(steps.WEIGHT_ONLY_PRODUCT, job, independent=plan.independent and not made))
        return made

    return lower


_INT4_SCRATCH = ("q", "q_sums", "row_scale")


def _use(plan: Lowering, places: Sequence[Scratch], job: ctypes.Structure, names: Sequence[str]) -> None:
    for place, name in zip(places, names, strict=True):
        place.use(plan.group, job, name)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _quantized(
    plan: Lowering, x: torch.Tensor, rows: torch.Tensor, channel_scale: torch.Tensor | None
) -> tuple[list[Description], tuple[Scratch, ...]]:
    """The steps that quantise ``rows``, the place of ``x``, if it is not done already; and where they are then."""
    key = (storage_of(x), place_of(x), _INT8, _address(channel_scale))
    known = plan.quantized.get(key)
    if known is not None:
        return [], known
    m, k = rows.shape
    maker = plan.makers.get(storage_of(x))
    born = plan.group if maker is None else maker.group
    scratch_rows, row_bytes = native.function("int8_rows")(m), native.function("int8_row_bytes")(k)
    places = plan.reserve(scratch_rows * row_bytes, born), plan.reserve(4 * m, born)
    plan.quantized[key] = places
    made: list[Description] = []
    if maker is not None and maker.rows.shape == rows.shape and maker.rows.data_ptr() == rows.data_ptr():
        job: ctypes.Structure = maker.job
        maker.job.channel_scale = plan.own(channel_scale)
        del plan.makers[storage_of(x)]
    else:
        job = Int8Step(x=rows.data_ptr(), m=m, k=k, x_stride=rows.stride(0), channel_scale=plan.own(channel_scale))
        made.append(describe(steps.INT8_QUANTIZE, job))
    for place, name in zip(places, ("q", "scale"), strict=True):
        place.use(plan.group, job, name)
    return made, places


# ---- normalisation
def _layer_norm(
    plan: Lowering,
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    epsilon: float,
    *,
    result: Any,
) -> list[Description]:
    y = result[0]
    columns = x.shape[-1]
    if list(shape) != [columns] or columns > _MOST_COLUMNS or any(map(plan.is_read_later, result[1:])):
        raise NotNative
    if not (lanes := norms.lanes()):
        raise NotNative
    target = plan.rows(y)
    if not target.is_contiguous():
        raise NotNative
    added = plan.absorbed
    source = plan.rows(x if added is None else added.args[0])
    job = NormStep(
        x=source.data_ptr(),
        x_stride=source.stride(0),
        weight=plan.own(weight),
        bias=plan.own(bias),
        y=target.data_ptr(),
        rows=source.shape[0],
        columns=columns,
        epsilon=epsilon,
        lanes=lanes,
    )
    if added is not None:
        residual = plan.rows(added.args[1])
        job.residual, job.r_stride = residual.data_ptr(), residual.stride(0)
        if plan.is_read_later(added.result):
            total = plan.rows(added.result)
            if not total.is_contiguous():
                raise NotNative
            job.sum = total.data_ptr()
    plan.set_maker(y, target, job)
    return [describe(steps.NORM, job)]


# ---- attention
def _attention(
    plan: Lowering,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    *,
    result: torch.Tensor,
) -> list[Description]:
    q, k, v, y = map(plan.live, (query, key, value, result))
    batch, heads, queries, width = q.shape
    keys = attention.routed_keys(queries, k.shape[2])
    problem = Problem("attention", batch * heads * queries, keys, width, q.dtype)
    if q.dtype != torch.float32 and queries > attention.FEW_QUERIES:
        raise NotNative
    if attention.why_not(problem) or any(t.stride(3) != 1 for t in (q, k, v)):
        raise NotNative
    if not y.transpose(1, 2).is_contiguous():
        raise NotNative
    seen = None if mask is None else plan.live(mask)
    if seen is not None and (seen.dtype not in (torch.bool, torch.float32) or (seen.dim() and seen.stride(-1) > 1)):
        raise NotNative
    taken = None if sinks is None else plan.live(sinks)
    if taken is not None and taken.dtype != torch.float32:
        raise NotNative
    threads = torch.get_num_threads()
    scale = 1 / math.sqrt(max(width, 1)) if scale is None else scale
    job = attention.job(q, k, v, seen, causal, scale, y.transpose(1, 2), threads, taken)
    floats = native.function("attention_scratch")(ctypes.addressof(job))
    plan.reserve(4 * floats).use(plan.group, job, "scratch")
    plan.reserve(4 * batch * k.shape[1]).use(plan.group, job, "done")
    return [describe(steps.ATTENTION, job)]


#: By the name of a recorded call.
ROWS: dict[str, Callable[..., list[Description]]] = {
    _INT8: _int8_linear,
    _INT4: _int4_int8_linear,
    _W4A16: _weight_only("int4_linear"),
    _W8A16: _weight_only("int8_weight_only_linear"),
    _NORM: _layer_norm,
    "step attention": _attention,
}
