"""The root mean square norm of Llama and its kin: several recorded operators, and a sum before them, as one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tilewright.kernels.cpu import norms, steps
from tilewright.kernels.cpu.lowering import Lowering, NotNative, place_of
from tilewright.kernels.cpu.row_steps import NormStep, describe
from tilewright.kernels.cpu.steps import Description

if TYPE_CHECKING:
    from tilewright.kernels.cpu.recording import Call

_ADD, _MULTIPLY = "aten.add.Tensor", "aten.mul.Tensor"
#: From so many columns on PyTorch may have several threads add up one row.
_MOST_COLUMNS = 1 << 15


class RmsNorm(NamedTuple):
    """What some calls compute together: (x + residual) * rsqrt(mean((x + residual)^2) + epsilon) * (weight + offset).

    total: the call that adds the residual. last: the call whose result is that of all. inner: the results between.
    calls: how many there are.
    """

    x: torch.Tensor
    total: Call | None
    epsilon: float
    weight: torch.Tensor | None
    offset: float
    last: Call
    inner: list[torch.Tensor]
    calls: int


def rms_norm_at(calls: Sequence[Call], begin: int) -> int:
    """How many calls from number ``begin`` on are such a norm; 0 where they are none."""
    found = read_rms_norm(calls[begin : begin + 8])
    return 0 if found is None else found.calls


def read_rms_norm(calls: Sequence[Call]) -> RmsNorm | None:
    """What the first of ``calls`` compute together, if it is such a norm."""
    if len(calls) < 5 or calls[0].name not in (_ADD, "aten.pow.Tensor_Scalar"):
        return None
    total = calls[0] if calls[0].name == _ADD else None
    if total is not None and not _adds_alike(total):
        return None
    at = 0 if total is None else 1
    if len(calls) < at + 5 or any(call.kwargs for call in calls[at : at + 5]):
        return None
    power, mean, shift, root, scaled = calls[at : at + 5]
    x = power.args[0]
    names = [each.name for each in (power, mean, shift, root, scaled)]
    if names != ["aten.pow.Tensor_Scalar", "aten.mean.dim", _ADD, "aten.rsqrt.default", _MULTIPLY]:
        return None
    if total is not None and place_of(x) != place_of(total.result):
        return None
    if power.args[1] != 2 or x.dtype != torch.float32 or len(shift.args) != 2:
        return None
    if mean.args[1:] not in (([-1], True), ([x.dim() - 1], True)) or isinstance(shift.args[1], torch.Tensor):
        return None
    chain = [(mean, power), (shift, mean), (root, shift)]
    if any(place_of(each.args[0]) != place_of(before.result) for each, before in chain):
        return None
    if not _are(scaled, x, root.result):
        return None
    inner = [power.result, mean.result, shift.result, root.result]
    found = RmsNorm(x, total, float(shift.args[1]), None, 0.0, scaled, inner, at + 5)
    return _with_weight(found, calls[at + 5 : at + 7])


def _with_weight(norm: RmsNorm, following: Sequence[Call]) -> RmsNorm:
    """The norm and the multiplication by a weight, or by a number more than it, if that follows."""
    offset, made = 0.0, []
    if following and following[0].name == _ADD and len(following) == 2 and not following[0].kwargs:
        weight, offset = following[0].args[:2]
        if len(following[0].args) != 2 or isinstance(offset, torch.Tensor):
            return norm
        made, following = [following[0].result], following[1:]
    if not following or following[0].name != _MULTIPLY or following[0].kwargs:
        return norm
    factors = following[0].args
    rows = [place_of(each) == place_of(norm.last.result) for each in factors if isinstance(each, torch.Tensor)]
    if rows not in ([True, False], [False, True]):
        return norm
    factor = factors[rows.index(False)]
    if made and place_of(factor) != place_of(made[0]):
        return norm
    weight = weight if made else factor
    if weight.shape != norm.x.shape[-1:] or weight.dtype != torch.float32:
        return norm
    inner = [*norm.inner, norm.last.result, *made]
    return norm._replace(
        weight=weight, offset=float(offset), last=following[0], inner=inner, calls=norm.calls + 1 + len(made)
    )


def _adds_alike(call: Call) -> bool:
    a, b = call.args[:2]
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return tensors and len(call.args) == 2 and not call.kwargs and a.shape == b.shape and a.dtype == b.dtype


def _are(call: Call, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the call has these two arguments, in either order."""
    given = [place_of(each) for each in call.args if isinstance(each, torch.Tensor)]
    return given in ([place_of(a), place_of(b)], [place_of(b), place_of(a)])


def lower_rms_norm(plan: Lowering, norm: RmsNorm) -> list[tuple[Description, list[Any]]]:
    """The step, and the calls whose results are there after it."""
    columns = norm.x.shape[-1]
    lanes = norms.square_lanes()
    if not lanes or not lanes <= columns < _MOST_COLUMNS or any(map(plan.is_read_later, norm.inner)):
        raise NotNative
    target = plan.rows(norm.last.result)
    source = plan.rows(norm.x if norm.total is None else norm.total.args[0])
    if not target.is_contiguous():
        raise NotNative
    weight = None if norm.weight is None else plan.constant(norm.weight) + norm.offset
    job = NormStep(
        x=source.data_ptr(),
        x_stride=source.stride(0),
        weight=plan.own(weight),
        y=target.data_ptr(),
        rows=source.shape[0],
        columns=columns,
        epsilon=norm.epsilon,
        lanes=lanes,
    )
    calls = [norm.last]
    if norm.total is not None:
        residual = plan.rows(norm.total.args[1])
        job.residual, job.r_stride = residual.data_ptr(), residual.stride(0)
        if plan.is_read_later(norm.total.result):
            total = plan.rows(norm.total.result)
            if not total.is_contiguous():
                raise NotNative
            job.sum = total.data_ptr()
            calls.insert(0, norm.total)
    plan.set_maker(norm.last.result, target, job)
    return [(describe(steps.RMS_NORM, job), calls)]
