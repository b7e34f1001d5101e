"""Layer norm and RMS norm followed at once by per-row int8 quantisation, in Triton.

    layer norm: n = (x - mean(x)) / sqrt(var(x) + eps) * w + b        RMS norm: n = x / sqrt(mean(x^2) + eps) * w

x [M, K] fp16, bf16 or fp32 of any strides; w and b optional [K]; q int8 [M, K] contiguous; s float32 [M]. All in
float32, and n is quantised as ``triton.row_quantize`` says, without ever being written.

A program takes whole rows. Up to 16,384 columns stay in registers and x is read once; longer rows are read once for
each statistic, once for the largest value and once to quantise (from the cache, where they fit). The variance is that
of the centred values: the difference of two means of squares would cancel.
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

#: Rows are cut up as for quantisation alone: the statistics need no more registers than the values.
CONFIGS = ROW_CONFIGS
TUNED = tunable(__name__, QuantizeConfig.for_problem, candidates, shares=SHARED_SOURCES)
why_not = why_not_float_rows


@triton.jit
def _load_block(x_rows, column, row_mask, K, stride_xk):
    mask = row_mask & (column < K)
    return tl.load(x_rows + column.to(tl.int64) * stride_xk, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _scale_and_shift(v, weight_ptr, bias_ptr, column, K):
    """v * w + b; 0 beyond column K, where v need not be."""
    if weight_ptr is not None:
        v *= tl.load(weight_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        v += tl.load(bias_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    return tl.where(column < K, v, 0.0)


@triton.jit
def _reciprocal_root(mean_square, eps):
    # Once for each row, so exact: the approximate instruction would cost every value of the row its last bits.
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(mean_square + eps))


@triton.jit(do_not_specialize=["M"])
def norm_quantize_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    q_ptr,
    scale_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    eps,
    SUBTRACT_MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """q and scale of ROWS rows of x [M, K]. SUBTRACT_MEAN: layer norm, else RMS norm."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_K)[None, :]
    row_mask = row[:, None] < M
    wide_row = row[:, None].to(tl.int64)
    x_rows = x_ptr + wide_row * stride_xm
    q_rows = q_ptr + wide_row * K
    if ONE_BLOCK:
        v = _load_block(x_rows, column, row_mask, K, stride_xk)
        if SUBTRACT_MEAN:
            mean = tl.sum(v, axis=1)[:, None] / K
            v = tl.where(column < K, v - mean, 0.0)
        v *= _reciprocal_root(tl.sum(v * v, axis=1)[:, None] / K, eps)
        v = _scale_and_shift(v, weight_ptr, bias_ptr, column, K)
        scale = scale_of(tl.max(magnitude_bits(v), axis=1))
        tl.store(q_rows + column, quantize_values(v, scale[:, None]), mask=row_mask & (column < K))
    else:
        mean = tl.zeros((ROWS, 1), tl.float32)
        if SUBTRACT_MEAN:
            total = tl.zeros((ROWS, BLOCK_K), tl.float32)
            for start in range(0, K, BLOCK_K):
                total += _load_block(x_rows, start + column, row_mask, K, stride_xk)
            mean = tl.sum(total, axis=1)[:, None] / K
        squares = tl.zeros((ROWS, BLOCK_K), tl.float32)
        for start in range(0, K, BLOCK_K):
            v = _load_block(x_rows, start + column, row_mask, K, stride_xk)
            v = tl.where(start + column < K, v - mean, 0.0)
            squares += v * v
        factor = _reciprocal_root(tl.sum(squares, axis=1)[:, None] / K, eps)
        top = tl.zeros((ROWS, BLOCK_K), tl.int32)
        for start in range(0, K, BLOCK_K):
            v = (_load_block(x_rows, start + column, row_mask, K, stride_xk) - mean) * factor
            top = tl.maximum(top, magnitude_bits(_scale_and_shift(v, weight_ptr, bias_ptr, start + column, K)))
        scale = scale_of(tl.max(top, axis=1))
        for start in range(0, K, BLOCK_K):
            v = (_load_block(x_rows, start + column, row_mask, K, stride_xk) - mean) * factor
            v = _scale_and_shift(v, weight_ptr, bias_ptr, start + column, K)
            tl.store(q_rows + start + column, quantize_values(v, scale[:, None]), mask=row_mask & (start + column < K))
    tl.store(scale_ptr + row, scale, mask=row < M)


def plan_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    subtract_mean: bool,
    q: torch.Tensor,
    scale: torch.Tensor,
    config: QuantizeConfig | None = None,
) -> list[Launch]:
    """The launch that normalises ``x`` [M, K] and quantises it into ``q`` and ``scale``; weight and bias contiguous."""
    if config is None:
        config = TUNED.choose(rows_problem("layer_norm_quantize" if subtract_mean else "rms_norm_quantize", x))
    others = {"weight_ptr": weight, "bias_ptr": bias, "eps": float(eps), "SUBTRACT_MEAN": subtract_mean}
    return plan_rows(norm_quantize_kernel, config, x, q, scale, **others)


def layer_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [..., K] float on a GPU; weight and bias [K] -> (int8 [..., K], float32 scale [...])."""
    return run_rows(x, plan_norm_quantize, weight=weight, bias=bias, eps=eps, subtract_mean=True)


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [..., K] float on a GPU; weight [K] -> (int8 [..., K], float32 scale [...])."""
    return run_rows(x, plan_norm_quantize, weight=weight, bias=None, eps=eps, subtract_mean=False)
