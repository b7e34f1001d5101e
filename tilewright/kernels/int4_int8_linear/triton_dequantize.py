"""Linear layer on int4 weights and int8 activations (W4A8) for large batches: a library multiplies in 16 bits.

    w[n, k] = dtype((u[n, k] - z[n, g]) * s[n, g])
    y[m, n] = activation(s_x[m] * sum_k w[n, k] * q[m, k] + b[n]) + r[m, n]

A sum of int32 has to be scaled and added up anew for each group of columns, so integers multiply at a third of their
rate (H200). From some hundred rows on it is faster to dequantise the weight once, as W4A16 does (``int4_linear.
triton_dequantize``), and to multiply it by the integers of x, which are exact in fp16 and bf16. Sums are float32. The
rounding of w is that of the same layer in plain PyTorch.
"""

from __future__ import annotations

import torch

from tilewright.kernels.activation import check_activation
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.int4_linear.dequantize import row_blocks, wide_product
from tilewright.kernels.int4_linear.triton_dequantize import DequantizeConfig, plan_dequantize
from tilewright.kernels.quantize.triton_quantize import quantize_per_row
from tilewright.kernels.triton.common import as_matrix, why_not_on_gpu
from tilewright.kernels.triton.tiles import plan_sum_parts

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
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    group_size: int,
    activation: str = "none",
    channel_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """See the reference."""
    check_activation(activation)
    n, k = len(weight_packed), x.shape[-1]
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x_q, x_scale = quantize_per_row(x, channel_scale)
    rows, out_rows = as_matrix(x_q).to(x.dtype), as_matrix(out)
    packed, scale = weight_packed.contiguous(), weight_scale.contiguous()
    zero = None if weight_zero is None else weight_zero.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else as_matrix(residual.expand(out.shape))
    config = DequantizeConfig.for_problem(
        Problem("int4_linear", len(rows), n, k, x.dtype, group_size=group_size, **device_facts(x.device))
    )
    for first, last in row_blocks(n, k, x.dtype):
        scratch = torch.empty(last - first, 8 * packed.shape[1], dtype=x.dtype, device=x.device)
        for launch in plan_dequantize(
            packed, scale, zero, scratch, first_row=first, group_size=group_size, config=config
        ):
            launch.run()
        sums = wide_product(rows, scratch[:, :k]).unsqueeze(0)
        plan_sum_parts(sums, x_scale.reshape(-1), bias, residual, out_rows, activation, first_column=first).run()
    return out
