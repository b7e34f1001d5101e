"""W8A16 linear on a CPU: a C kernel, else ATen's int8 weight-only product for small batches, else dequantised blocks
and a library product.

ATen's product wants bfloat16 activations (with float32 it is a scalar loop) and reads the canonical weight as it is. It
does the same work for every row, so from some batch on it is cheaper to widen a block of the weight once, while it is
in cache, and to multiply it with all rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from typing_extensions import Unpack

from tilewright.kernels.cpu import panels
from tilewright.kernels.cpu.memory import WEIGHT_BLOCK_ELEMENTS, scratch
from tilewright.kernels.cpu.probes import why_no_int8pack
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import End, finish_rows

#: Rows up to which ATen's product is faster (4096 x 4096, two threads).
SMALL_BATCH = 32


def why_not(problem: Problem) -> str | None:
    """Why ATen's int8 weight-only product does not take the problem, or None."""
    if 0 in (problem.m, problem.n, problem.k):
        return "nothing to multiply"
    if problem.multiply_dtype != torch.bfloat16:
        return f"is fast in bfloat16 only, not in {problem.multiply_dtype}"
    if problem.k % 16:
        return "crashes when K is no multiple of 16"  # seen with torch 2.13: it takes every row to be aligned
    if problem.m > SMALL_BATCH:
        return f"dequantised blocks are faster above {SMALL_BATCH} rows"
    return why_no_int8pack()


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    """``matrix`` contiguous and at a multiple of 32 bytes, copied where it is not: ATen's product crashes elsewhere."""
    matrix = matrix.contiguous()
    return matrix if matrix.data_ptr() % 32 == 0 else matrix.clone()


def int8_weight_only_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    compute_dtype: torch.dtype | None,
    **end: Unpack[End],
) -> torch.Tensor:
    """See ``reference.int8_weight_only_linear``; the scale is applied to the sums, in float32."""
    rows = _aligned(x.reshape(-1, x.shape[-1]).to(torch.bfloat16))
    ones = packed(weight, "int8pack-ones", lambda: torch.ones(len(weight), dtype=torch.bfloat16))
    y = torch._weight_int8pack_mm(rows, _aligned(weight), ones).float().mul_(weight_scale)
    return finish_rows(y, None, x.dtype, **end).view(*x.shape[:-1], len(weight))


def dequantized_blocks(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    compute_dtype: torch.dtype | None,
    **end: Unpack[End],
) -> torch.Tensor:
    """See ``reference.int8_weight_only_linear``. The scale is applied to the sums, so the widened weight is exact."""
    dtype = library_dtype(compute_dtype or x.dtype)
    n, k = weight.shape
    rows = x.reshape(-1, k).to(compute_dtype or x.dtype).to(dtype)
    y = torch.empty(len(rows), n, dtype=dtype)
    step = max(1, WEIGHT_BLOCK_ELEMENTS // k)
    block = scratch((min(step, n), k), dtype, "weight block")
    for i in range(0, n, step):
        part = block[: min(step, n - i)].copy_(weight[i : i + step])
        torch.mm(rows, part.t(), out=y[:, i : i + step])
    y = (y if dtype == torch.float64 else y.float()).mul_(weight_scale)
    return finish_rows(y, None, x.dtype, **end).view(*x.shape[:-1], n)


def prepare_blocks(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    compute_dtype: torch.dtype | None,
    k: int,
) -> Callable[..., torch.Tensor]:
    """``dequantized_blocks`` as a function of x and the residual; blocks are widened by a C kernel where there is one,
    the scale with them.
    """

    def other(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        end: End = {"bias": bias, "residual": residual, "activation": activation}
        return dequantized_blocks(x, weight, weight_scale, compute_dtype, **end)

    return panels.prepare(weight, weight_scale, None, k, k, activation, bias, compute_dtype, other)


def library_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to call a CPU library product in: float16 products are slower than float32 ones on a CPU."""
    return torch.float32 if dtype == torch.float16 else dtype
