"""Dynamic int8 quantisation of activations, one scale for each row, in Triton.

    s[m] = max_k |v[m, k]| / 127,   q[m, k] = clamp(round_half_even(v[m, k] / s[m]), -127, 127),   v = float32(x) * c

x [M, K] fp16, bf16 or fp32 of any strides; c optional [K]; q int8 [M, K] contiguous; s float32 [M]. Agrees with the
reference to the bit: ``triton.row_quantize`` says how.

A program takes whole rows. Up to 16,384 columns stay in registers and x is read once; longer rows are read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilewright.aot.launch import Launch
from tilewright.kernels.triton.common import why_not_float_rows
from tilewright.kernels.triton.row_quantize import (
    ROW_CONFIGS,
    SHARED_SOURCES,
    QuantizeConfig,
    candidates,
    magnitude_bits,
    plan_rows,
    quantize_values,
    rows_problem,
    run_rows,
    scale_of,
)
from tilewright.kernels.tuning import tunable

CONFIGS = ROW_CONFIGS
TUNED = tunable(__name__, QuantizeConfig.for_problem, candidates, shares=SHARED_SOURCES)
why_not = why_not_float_rows


@triton.jit
def _load_values(x_rows, channel_scale_ptr, column, row_mask, K, stride_xk):
    mask = row_mask & (column < K)
    v = tl.load(x_rows + column.to(tl.int64) * stride_xk, mask=mask, other=0.0).to(tl.float32)
    if channel_scale_ptr is not None:
        v *= tl.load(channel_scale_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    return v


# One binary serves every batch: nothing is gained from knowing that M is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["M"])
def quantize_per_row_kernel(
    x_ptr,
    channel_scale_ptr,
    q_ptr,
    scale_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """q and scale of ROWS rows of x [M, K]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_K)[None, :]
    row_mask = row[:, None] < M
    wide_row = row[:, None].to(tl.int64)
    x_rows = x_ptr + wide_row * stride_xm
    q_rows = q_ptr + wide_row * K
    if ONE_BLOCK:
        v = _load_values(x_rows, channel_scale_ptr, column, row_mask, K, stride_xk)
        scale = scale_of(tl.max(magnitude_bits(v), axis=1))
        tl.store(q_rows + column, quantize_values(v, scale[:, None]), mask=row_mask & (column < K))
    else:
        top = tl.zeros((ROWS, BLOCK_K), tl.int32)
        for start in range(0, K, BLOCK_K):
            v = _load_values(x_rows, channel_scale_ptr, start + column, row_mask, K, stride_xk)
            top = tl.maximum(top, magnitude_bits(v))
        scale = scale_of(tl.max(top, axis=1))
        for start in range(0, K, BLOCK_K):
            v = _load_values(x_rows, channel_scale_ptr, start + column, row_mask, K, stride_xk)
            tl.store(q_rows + start + column, quantize_values(v, scale[:, None]), mask=row_mask & (start + column < K))
    tl.store(scale_ptr + row, scale, mask=row < M)


def plan_quantize_per_row(
    x: torch.Tensor,
    channel_scale: torch.Tensor | None,
    q: torch.Tensor,
    scale: torch.Tensor,
    config: QuantizeConfig | None = None,
) -> list[Launch]:
    """The launch that quantises ``x`` [M, K] into ``q`` and ``scale``; channel_scale [K] must be contiguous."""
    config = config or TUNED.choose(rows_problem("quantize_per_row", x))
    return plan_rows(quantize_per_row_kernel, config, x, q, scale, channel_scale_ptr=channel_scale)


def quantize_per_row(x: torch.Tensor, channel_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [..., K] fp16, bf16 or fp32 on a GPU, ``channel_scale`` [K] -> (int8 [..., K], float32 scale [...])."""
    return run_rows(x, plan_quantize_per_row, channel_scale=channel_scale)
