"""W4A8 linear on a CPU: in one call of a C kernel, or through oneDNN's u8 x s8 product for each group of columns,
accumulated in float32.

For oneDNN, the centred integers u - z fit int8, so a group is an int8 weight whose scale for each output channel is the
group's, and oneDNN's "sum" post-op adds the groups up in order without another pass over the result.
"""

from __future__ import annotations

import torch
from typing_extensions import Unpack

from tilewright.kernels.cpu import linear
from tilewright.kernels.cpu.probes import qlinear, why_no_qlinear
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import End, finish_rows
from tilewright.kernels.formats import int4
from tilewright.kernels.int8_linear.cpu import LARGEST_K
from tilewright.kernels.quantize.cpu import quantize_u8

#: A product of a nibble and a signed byte is at most 15 * 127: a group of so many stays inside int32.
LARGEST_GROUP = (2**31 - 1) // 1905
_Groups = tuple[tuple[torch.Tensor, torch.Tensor], ...]


def why_not(problem: Problem) -> str | None:
    """Why oneDNN does not take the problem, or None."""
    if 0 in (problem.m, problem.n, problem.k):
        return "nothing to multiply"
    if min(problem.group_size or problem.k, problem.k) > LARGEST_K:
        return f"int32 sums of u8 products may overflow in groups beyond {LARGEST_K}"
    return why_no_qlinear()


def why_not_native(problem: Problem) -> str | None:
    """Why the C kernel does not take the problem, or None."""
    group_size = problem.group_size or problem.k
    if min(group_size, problem.k) > LARGEST_GROUP:
        return f"int32 sums may overflow in groups beyond {LARGEST_GROUP}"
    return linear.why_no_int4_groups(problem.k, group_size) or linear.why_not(problem)


def _prepack(
    weight_packed: torch.Tensor, weight_scale: torch.Tensor, weight_zero: torch.Tensor | None, group_size: int, k: int
) -> _Groups:
    """(prepacked int8 weight, float32 scale [N]) of each group."""
    centred = int4.unpack_centred(weight_packed, weight_zero, group_size, k)
    return tuple(
        (torch.ops.onednn.qlinear_prepack(part.contiguous(), None), scale.contiguous())
        for part, scale in zip(centred.split(group_size, 1), weight_scale.float().unbind(1), strict=True)
    )


def int4_int8_linear(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    channel_scale: torch.Tensor | None,
    group_size: int,
    **end: Unpack[End],
) -> torch.Tensor:
    """See ``reference.int4_int8_linear``."""
    n, k = len(weight_packed), x.shape[-1]
    groups, zeros = packed(
        weight_packed,
        f"onednn-groups of {group_size} in {k} columns",
        lambda: (
            _prepack(weight_packed, weight_scale, weight_zero, group_size, k),
            torch.zeros(n, dtype=torch.int32),
        ),
        weight_scale,
        weight_zero,
    )
    q, x_scale = quantize_u8(x.reshape(-1, k), channel_scale)
    parts = q.split(group_size, 1)
    y = qlinear(parts[0].contiguous(), *groups[0], zeros)
    for part, group in zip(parts[1:], groups[1:], strict=True):
        y = qlinear(part.contiguous(), *group, zeros, y)
    return finish_rows(y, x_scale, x.dtype, **end).view(*x.shape[:-1], n)
