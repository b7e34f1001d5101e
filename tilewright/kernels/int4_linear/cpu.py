"""W4A16 linear on a CPU: a C kernel, else ATen's int4 weight-only product for small batches, else dequantised blocks
and a library product.

ATen's product wants bfloat16 activations and scales. It does the same work for every row, so from some batch on it is
cheaper to widen a block of the weight once, while it is in cache, and to multiply it with all rows. The blocks need no
repacked weight: the low nibbles of the canonical bytes are the even columns and the high ones the odd columns, so it is
x whose columns are reordered, evens first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from typing_extensions import Unpack

from tilewright.kernels.cpu import kept, linear, panels
from tilewright.kernels.cpu.memory import WEIGHT_BLOCK_ELEMENTS, scratch
from tilewright.kernels.cpu.probes import why_no_int4pack
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import End, finish_rows
from tilewright.kernels.formats import int4
from tilewright.kernels.int8_weight_only_linear.cpu import library_dtype

#: Rows up to which ATen's product is faster (4096 x 4096, two threads).
SMALL_BATCH = 40
_KERNEL_GROUPS = (256, 128, 64, 32)


def why_not_native(problem: Problem) -> str | None:
    """Why the C kernel does not take the problem, or None."""
    return linear.why_no_int4_groups(problem.k, problem.group_size or problem.k) or linear.why_not_weight_only(problem)


def _kernel_group(k: int, group_size: int) -> int | None:
    """The largest group of ATen's kernel that splits a group of ours, or None."""
    if group_size >= k:  # one group for the whole row, which zeros may extend
        return next((group for group in _KERNEL_GROUPS if k % group == 0), 32)
    return next((group for group in _KERNEL_GROUPS if group_size % group == 0), None)


def why_not(problem: Problem) -> str | None:
    """Why ATen's int4 product does not take the problem, or None."""
    if 0 in (problem.m, problem.n, problem.k):
        return "nothing to multiply"
    if problem.multiply_dtype != torch.bfloat16:
        return f"is fast in bfloat16 only, not in {problem.multiply_dtype}"
    if problem.m > SMALL_BATCH:
        return f"dequantised blocks are faster above {SMALL_BATCH} rows"
    if _kernel_group(problem.k, problem.group_size or problem.k) is None:
        return f"takes groups that are a multiple of 32, not of {problem.group_size}"
    return why_no_int4pack()


def _prepack(
    weight_packed: torch.Tensor, weight_scale: torch.Tensor, weight_zero: torch.Tensor | None, group_size: int, k: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(ATen's weight, scales and offsets [K / G, N, 2], G) with rows padded to a multiple of 16 and columns to one
    of G.
    """
    n = len(weight_packed)
    group = _kernel_group(k, group_size) or 32
    u = F.pad(int4.unpack(weight_packed, k).to(torch.int32), (0, -k % group, 0, -n % 16), value=int4.MIDDLE)
    scale = weight_scale.float()
    zero = torch.full_like(scale, int4.MIDDLE) if weight_zero is None else int4.unpack_zero(weight_zero, n).float()
    columns = torch.arange(0, u.shape[1], group) // group_size  # our group of each group of the kernel
    columns.clamp_(max=scale.shape[1] - 1)
    offset = (int4.MIDDLE - zero) * scale
    pairs = torch.stack([scale, offset], -1)[:, columns].transpose(0, 1)
    pairs = F.pad(pairs, (0, 0, 0, -n % 16)).to(torch.bfloat16).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(u.contiguous(), 1), pairs, group


def int4_linear(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    group_size: int,
    compute_dtype: torch.dtype | None,
    **end: Unpack[End],
) -> torch.Tensor:
    """See ``reference.int4_linear``; scales and offsets are rounded to bfloat16 in place of the dequantised weight."""
    n, k = len(weight_packed), x.shape[-1]
    weight, pairs, group = packed(
        weight_packed,
        f"int4pack of {k} columns in groups of {group_size}",
        lambda: _prepack(weight_packed, weight_scale, weight_zero, group_size, k),
        weight_scale,
        weight_zero,
    )
    rows = F.pad(x.reshape(-1, k).to(torch.bfloat16), (0, -k % group)).contiguous()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight, group, pairs)[:, :n].float()
    return finish_rows(y, None, x.dtype, **end).reshape(*x.shape[:-1], n)


def why_not_blocks(problem: Problem) -> str | None:
    """Why dequantised blocks do not take the problem, or None."""
    if 0 in (problem.m, problem.n, problem.k):
        return "nothing to multiply"
    group_size = problem.group_size or problem.k
    if group_size < problem.k and group_size % 2:
        return f"groups must have an even size, not {problem.group_size}"
    if group_size < problem.k and int4.group_count(problem.k, group_size) * group_size < -(-problem.k // 8) * 8:
        return f"the last word of a row reaches beyond the last group of {group_size}"
    return None


def why_not_kept(problem: Problem) -> str | None:
    """Why a weight that is kept dequantised does not take the problem, or None."""
    return kept.why_not(problem) or why_not_blocks(problem)


def _evens_first(x: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """x [M, K] as ``dtype`` [M, 2 * columns]: even columns, zeros up to ``columns``, odd columns, zeros."""
    m = len(x)
    rows = scratch((m, 2, columns), dtype, "evens first")
    for parity in (0, 1):
        half = x[:, parity::2]
        rows[:, parity, : half.shape[1]] = half
        rows[:, parity, half.shape[1] :] = 0
    return rows.view(m, 2 * columns)


def dequantized_blocks(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    group_size: int,
    compute_dtype: torch.dtype | None,
    **end: Unpack[End],
) -> torch.Tensor:
    """See ``reference.int4_linear``."""
    narrow = compute_dtype or x.dtype
    dtype = library_dtype(narrow)
    n, groups = weight_scale.shape
    stored = weight_packed.shape[1] * 4  # columns of each parity
    per_group = stored if groups == 1 else group_size // 2
    columns = max(stored, groups * per_group)
    rows = _evens_first(x.reshape(-1, x.shape[-1]).to(narrow), columns, dtype)
    nibbles = weight_packed.contiguous().view(torch.uint8)
    # A scale of another dtype stays as it is: the product is then taken in float32 and rounded once.
    scale = (weight_scale if weight_scale.dtype == dtype else weight_scale.float()).reshape(n, 1, groups, 1)
    zero = torch.full((n, 1, groups, 1), int4.MIDDLE, dtype=dtype)
    if weight_zero is not None:
        zero = int4.unpack_zero(weight_zero, n).to(dtype).reshape(n, 1, groups, 1)
    y = torch.empty(len(rows), n, dtype=dtype)
    step = max(1, WEIGHT_BLOCK_ELEMENTS // (2 * columns))
    block = scratch((min(step, n), 2, columns), dtype, "weight block")
    nibble = scratch((min(step, n), stored), torch.uint8, "nibble block")
    for i in range(0, n, step):
        j = min(i + step, n)
        part, low = block[: j - i], nibble[: j - i]
        part[:, :, stored:] = 0
        part[:, 0, :stored] = torch.bitwise_and(nibbles[i:j], 15, out=low)
        part[:, 1, :stored] = torch.bitwise_right_shift(nibbles[i:j], 4, out=low)
        part.view(j - i, 2, groups, -1).sub_(zero[i:j]).mul_(scale[i:j])
        torch.mm(rows, part.view(j - i, -1).t(), out=y[:, i:j])
    y = y if dtype == torch.float64 else y.float()
    return finish_rows(y, None, x.dtype, **end).view(*x.shape[:-1], n)


def prepare_blocks(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    activation: str,
    compute_dtype: torch.dtype | None,
    k: int,
) -> Callable[..., torch.Tensor]:
    """``dequantized_blocks`` as a function of x and the residual; blocks are widened by a C kernel where there is
    one.
    """
    weight = weight_packed, weight_scale, weight_zero, group_size

    def other(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        end: End = {"bias": bias, "residual": residual, "activation": activation}
        return dequantized_blocks(x, *weight, compute_dtype, **end)

    return panels.prepare(*weight, k, activation, bias, compute_dtype, other)
