"""W8A16 linear layer for large batches on a GPU: the weight is widened once, a library multiplies, a kernel finishes.

    y[m, n] = activation(s_w[n] * sum_k x[m, k] * w[n, k] + b[n]) + r[m, n]

int8 is exact in every compute dtype, so nothing is rounded but x; the library's sums are float32 [M, N], and one pass
over them scales, adds, and rounds once to the dtype of x (``triton.split_k``). Costs a temporary weight of N x K in the
compute dtype, written and read once: little beside the product from some hundred rows on. PyTorch's own conversion of a
weight of 8192 x 8192 took most of 150 us on an H200, three times what its bytes take: hence a kernel for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import End
from tilewright.kernels.matrices import FLOAT_DTYPES, as_matrix, wide_product
from tilewright.kernels.triton.common import why_not_on_gpu
from tilewright.kernels.triton.linear import run_linear
from tilewright.kernels.triton.split_k import plan_reduce_parts

#: Weights of a program: four times 16 bytes for each of its threads.
BLOCK = 8192
WARPS = 4


@triton.jit
def widen_kernel(weight_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """BLOCK neighbours of ``count`` int8 values, in the dtype of ``out_ptr``."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(weight_ptr + place, mask=inside, other=0, eviction_policy="evict_first")
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=inside)


def plan_widen(weight: torch.Tensor, out: torch.Tensor) -> Launch:
    """The launch that fills ``out`` with the values of ``weight``, int8 of the same shape, both contiguous."""
    args = {"weight_ptr": weight, "out_ptr": out, "count": weight.numel()}
    return Launch(widen_kernel, (triton.cdiv(weight.numel(), BLOCK),), args, {"BLOCK": BLOCK}, WARPS, 1)


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None."""
    if problem.x_dtype not in FLOAT_DTYPES or problem.multiply_dtype not in FLOAT_DTYPES:
        return f"takes float16, bfloat16 and float32, not {problem.x_dtype} computed in {problem.multiply_dtype}"
    return why_not_on_gpu(problem)


def int8_weight_only_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    compute_dtype: torch.dtype | None = None,
    **end: Unpack[End],
) -> torch.Tensor:
    """x float [..., K], weight int8 [N, K], weight_scale [N], bias [N], residual [..., N] -> x.dtype [..., N]."""
    narrow = compute_dtype or x.dtype

    def launches(out: torch.Tensor, **end: Unpack[End]) -> Iterator[Launch]:
        wide = torch.empty(weight.shape, dtype=narrow, device=weight.device)
        if wide.numel():
            yield plan_widen(weight.contiguous(), wide)
        sums = wide_product(as_matrix(x).to(narrow), wide).unsqueeze(0)
        yield plan_reduce_parts(sums, None, weight_scale.contiguous(), out, **end)

    return run_linear(x, len(weight), x.dtype, launches, **end)
