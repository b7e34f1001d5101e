"""Convolution of an image with few channels in Triton, as networks begin: the whole window is one axis of the sum.

    y[m, o] = finish(sum_k x[window(m), k] * w[o, k]),  k = (i, j, c) in the order of memory

x [N, H, W, C] with C <= 4 channels, float, int8 or uint8; w OHWI [Co, R, S, C], read as [Co, R S C] padded with zeros
to a multiple of 32, which is made once for each weight; y [M, Co]. A tap has too few channels to fill a matrix
instruction: taken one by one they would leave 13/16 of it empty. All 27 values of a 3 x 3 window of three channels are
one step of 32, and the 147 of 7 x 7 are five. The image itself is not padded: values outside it, and those past the
window, read 0.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from tilewright.aot.launch import Launch
from tilewright.kernels.conv2d.triton_epilogue import finish_conv_tile, load_signed, multiply, pixel
from tilewright.kernels.conv2d.triton_launch import (
    SHARED_SOURCES,
    ConvCall,
    ConvTile,
    operators,
    tile_candidates,
    why_not_any_kernel,
    why_not_tile,
    window_launch,
)
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.tuning import tunable

MAX_CHANNELS = 4
BLOCK_K = 32


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem) -> ConvTile:
    """The tile for ``problem``. Loads of single values are not copied asynchronously, so two stages are enough."""
    tile = ConvTile.for_problem(problem, BLOCK_K)
    return replace(tile, block_k=BLOCK_K, num_stages=2)


TUNED = tunable(
    __name__,
    choose,
    lambda problem: tile_candidates(choose(problem), problem, stages=(1, 2)),
    why_not_tile,
    shares=SHARED_SOURCES,
)


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None."""
    if problem.conv is not None and problem.conv.groups > 1:
        return "takes one group"
    if problem.conv is not None and problem.conv.in_channels > MAX_CHANNELS:
        return f"is for up to {MAX_CHANNELS} input channels, not {problem.conv.in_channels}"
    return why_not_any_kernel(problem)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "pad_top", "pad_left"])
def stem_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    w_scale_ptr,
    w_sum_ptr,
    bias_ptr,
    residual_ptr,
    x_scale,
    x_zero,
    residual_scale,
    residual_zero,
    out_scale,
    out_zero,
    negative_slope,
    M,
    H,
    W,
    P,
    Q,
    pad_top,
    pad_left,
    n_units,
    x_image_units,
    x_row_units,
    x_pixel_units,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    UNIT_C: tl.constexpr,
    UNIT_N: tl.constexpr,
    PADDED_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    QUANTIZE: tl.constexpr,
    INTEGER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPILOGUE_PARTS: tl.constexpr,
):
    """One tile of out [M, N]; w [N, PADDED_K]. x_*_units: elements from one image, row, pixel to the next, / UNIT_C."""
    tl.static_assert(EPILOGUE_PARTS <= 2, "no tile of the stem is larger")
    N = n_units * UNIT_N
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    image, p, q = pixel(m, P, Q)
    h0 = p * STRIDE_H - pad_top
    w0 = q * STRIDE_W - pad_left
    first = image.to(tl.int64) * x_image_units + h0.to(tl.int64) * x_row_units + w0.to(tl.int64) * x_pixel_units
    x_window = x_ptr + (first * UNIT_C)[:, None]
    n_mask = n[:, None] < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
    for start in range(0, PADDED_K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        down = k // (S * C) * DILATION_H
        right = k // C % S * DILATION_W
        h = h0[:, None] + down[None, :]
        w = w0[:, None] + right[None, :]
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (m < M)[:, None] & (k < R * S * C)[None, :]
        offset = (down.to(tl.int64) * x_row_units + right.to(tl.int64) * x_pixel_units) * UNIT_C + k % C
        x_tile = load_signed(x_window + offset[None, :], inside, x_zero, w_sum_ptr is not None)
        w_tile = tl.load(w_ptr + n[:, None].to(tl.int64) * PADDED_K + k[None, :], mask=n_mask, other=0)
        acc = multiply(x_tile, w_tile, acc, INTEGER, PRECISION)
    column = n[None, :]
    finish_conv_tile(
        acc,
        out_ptr,
        w_scale_ptr,
        w_sum_ptr,
        bias_ptr,
        residual_ptr,
        x_scale,
        x_zero,
        residual_scale,
        residual_zero,
        out_scale,
        out_zero,
        negative_slope,
        m[:, None],
        column,
        m[:, None] < M,
        column < N,
        N,
        ACTIVATION,
        QUANTIZE,
    )


def padded_weight(weight: torch.Tensor) -> torch.Tensor:
    """OHWI [Co, R, S, C] as [Co, R S C] with zeros up to a multiple of ``BLOCK_K``; made once for each weight."""

    def make() -> torch.Tensor:
        rows = weight.detach().reshape(len(weight), -1)
        return F.pad(rows, (0, -rows.shape[1] % BLOCK_K))

    return packed(weight, f"conv stem {weight.dtype}", make)


def plan_stem(call: ConvCall, config: ConvTile | None = None) -> list[Launch]:
    """The launch that writes ``call.out``."""
    config = config or TUNED.choose(call.problem())
    n, c = call.columns, call.geometry.in_channels
    weight = padded_weight(call.weight)
    args, window = window_launch(call, c, n, weight)
    constants = {
        "C": c,
        **window,
        "PADDED_K": weight.shape[1],
        **call.constants(),
        **config.constants(),
    }
    grid = (triton.cdiv(call.rows, config.block_m), triton.cdiv(n, config.block_n))
    return [Launch(stem_kernel, grid, args, constants, config.num_warps, config.num_stages)]


conv2d_fused, int8_conv2d_fused = operators(plan_stem)
