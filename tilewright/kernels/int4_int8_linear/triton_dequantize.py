"""Linear layer on int4 weights and int8 activations (W4A8) for large batches: a library multiplies in 16 bits.

    w[n, k] = dtype((u[n, k] - z[n, g]) * s[n, g])
    y[m, n] = activation(s_x[m] * sum_k w[n, k] * q[m, k] + b[n]) + r[m, n]

A sum of int32 has to be scaled and added up anew for each group of columns, so integers multiply at a third of their
rate (H200). From some hundred rows on it is faster to dequantise the weight once, as W4A16 does (``int4_linear.
triton_dequantize``), and to multiply it by the integers of x, which are exact in fp16 and bf16. Sums are float32. The
rounding of w is that of the same layer in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.epilogue import End
from tilewright.kernels.matrices import as_matrix, wide_product
from tilewright.kernels.quantize.triton_quantize import quantize_per_row
from tilewright.kernels.triton.common import why_not_on_gpu
from tilewright.kernels.triton.int4_dequantize import DequantizeConfig, dequantized_blocks
from tilewright.kernels.triton.linear import run_linear
from tilewright.kernels.triton.split_k import plan_sum_parts

#: On an H200 integers are as fast at 512 rows (8192 x 8192), and 1.7 times as slow at 2048.
SMALLEST_M = 513


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None."""
    if problem.x_dtype not in (torch.float16, torch.bfloat16):
        return f"multiplies in float16 and bfloat16, not in {problem.x_dtype}"
    if problem.m < SMALLEST_M:
        return f"for batches from {SMALLEST_M} rows on, this one has {problem.m}: integers are as fast"
    return why_not_on_gpu(problem)


def int4_int8_linear(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None = None,
    *,
    group_size: int,
    channel_scale: torch.Tensor | None = None,
    **end: Unpack[End],
) -> torch.Tensor:
    """See the reference."""
    n, k = len(weight_packed), x.shape[-1]

    def launches(out: torch.Tensor, **end: Unpack[End]) -> Iterator[Launch]:
        x_q, x_scale = quantize_per_row(x, channel_scale)
        rows = as_matrix(x_q).to(x.dtype)
        problem = Problem("int4_linear", len(rows), n, k, x.dtype, group_size=group_size, **device_facts(x.device))
        weight = (weight_packed, weight_scale, weight_zero, k, x.dtype, group_size)
        for first, block in dequantized_blocks(*weight, DequantizeConfig.for_problem(problem)):
            sums = wide_product(rows, block).unsqueeze(0)
            yield plan_sum_parts(sums, x_scale.reshape(-1), out, first, **end)

    return run_linear(x, n, x.dtype, launches, **end)
