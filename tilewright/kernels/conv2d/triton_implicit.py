"""Convolution with any window, stride, dilation and groups in Triton: a matrix product whose left operand is never
written down.

    y[m, o] = finish(sum_{i, j, c} x[n, p s_h + i d_h - top, q s_w + j d_w - left, c] * w[o, i, j, c]),  m = (n, p, q)

x [N, H, W, C] float, int8 or uint8 with contiguous channels; w OHWI [Co, R, S, C / groups]; y [M, Co] for M = N P Q. A
program computes a tile of pixels x output channels of one group. Where each pixel's window begins is worked out once;
within a tap all rows of the tile are the same distance from there, and a row that looks at padding reads 0.

Two forms of loop. By taps: the window is unrolled, the mask of a tap is computed once, and a loop runs over channels.
Flat: one loop runs over taps and channels together, so that loads are pipelined across taps, which matters where a tap
has few channels; the mask is computed in each step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

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
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.triton.common import grouped_tile, slice_of
from tilewright.kernels.tuning import tunable

GROUP_M = 8
#: Taps up to which the window may be unrolled: each is a loop of its own in the code.
MAX_UNROLLED = 9


@dataclass(frozen=True)
class ImplicitConfig:
    """tile, and whether the loop is flat."""

    tile: ConvTile
    flat: bool

    @classmethod
    def for_problem(cls, problem: Problem) -> ImplicitConfig:
        """By taps only where each tap is long enough to fill the pipeline of loads by itself."""
        taps = 1 if problem.conv is None else problem.conv.taps
        depth = problem.k // taps
        tile = ConvTile.for_problem(problem, depth)
        return cls(tile, flat=taps > MAX_UNROLLED or depth < 2 * tile.num_stages * tile.block_k)


choose = functools.lru_cache(maxsize=4096)(ImplicitConfig.for_problem)


def candidates(problem: Problem) -> Iterator[ImplicitConfig]:
    """Tiles in both forms of the loop; a large window is not unrolled."""
    first = choose(problem)
    taps = 1 if problem.conv is None else problem.conv.taps
    for tile in tile_candidates(first.tile, problem, stages=(2, 3, 4)):
        for flat in (True, False) if taps <= MAX_UNROLLED else (True,):
            yield ImplicitConfig(tile, flat)


TUNED = tunable(
    __name__,
    choose,
    candidates,
    lambda config, problem: why_not_tile(config.tile, problem),
    shares=SHARED_SOURCES,
)
why_not = why_not_any_kernel


@triton.jit
def _tap_mask(h0, w0, i, j, H, W, m, M, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr):
    """[BM, 1]: whether tap (i, j) of each pixel lies inside the image."""
    h = h0 + i * DILATION_H
    w = w0 + j * DILATION_W
    return ((m < M) & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "pad_top", "pad_left"])
def implicit_kernel(
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
    c_units,
    x_image_units,
    x_row_units,
    x_pixel_units,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    FLAT: tl.constexpr,
    UNIT_C: tl.constexpr,
    UNIT_N: tl.constexpr,
    EVEN_C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    QUANTIZE: tl.constexpr,
    INTEGER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPILOGUE_PARTS: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of the channels of one group of out [M, Co]. n_units, c_units: output and input channels of a group;
    x_*_units: elements from one image, row, pixel to the next; each / UNIT_N or UNIT_C.
    """
    N = n_units * UNIT_N
    C = c_units * UNIT_C
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    group = tl.program_id(1)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    image, p, q = pixel(m, P, Q)
    h0 = p * STRIDE_H - pad_top
    w0 = q * STRIDE_W - pad_left
    first = image.to(tl.int64) * x_image_units + h0.to(tl.int64) * x_row_units + w0.to(tl.int64) * x_pixel_units
    x_window = x_ptr + (first * UNIT_C + group.to(tl.int64) * C)[:, None] + k[None, :]
    w_row = w_ptr + (group.to(tl.int64) * N + n[:, None]) * (R * S * C) + k[None, :]
    n_mask = n[:, None] < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
    # Distances between taps in 64 bits: a dilated window may span more than 2^31 elements.
    down = tl.full((), DILATION_H * UNIT_C, tl.int64) * x_row_units
    right = tl.full((), DILATION_W * UNIT_C, tl.int64) * x_pixel_units
    if FLAT:
        steps = tl.cdiv(C, BLOCK_K)
        for step in range(R * S * steps):
            tap = step // steps
            c = (step - tap * steps) * BLOCK_K
            i = tap // S
            j = tap % S
            x_mask = _tap_mask(h0, w0, i, j, H, W, m, M, DILATION_H, DILATION_W)
            w_mask = n_mask
            if not EVEN_C:
                c_mask = (c + k)[None, :] < C
                x_mask = x_mask & c_mask
                w_mask = w_mask & c_mask
            x = load_signed(x_window + (i * down + j * right + c), x_mask, x_zero, w_sum_ptr is not None)
            w = tl.load(w_row + (tap * C + c), mask=w_mask, other=0)
            acc = multiply(x, w, acc, INTEGER, PRECISION)
    else:
        for i in tl.static_range(R):
            for j in tl.static_range(S):
                tap_mask = _tap_mask(h0, w0, i, j, H, W, m, M, DILATION_H, DILATION_W)
                x_tap = x_window + (i * down + j * right)
                w_tap = w_row + (i * S + j) * C
                for c in range(0, C, BLOCK_K):
                    if EVEN_C:
                        x = load_signed(x_tap + c, tap_mask, x_zero, w_sum_ptr is not None)
                        w = tl.load(w_tap + c, mask=n_mask, other=0)
                    else:
                        c_mask = (c + k)[None, :] < C
                        x = load_signed(x_tap + c, tap_mask & c_mask, x_zero, w_sum_ptr is not None)
                        w = tl.load(w_tap + c, mask=n_mask & c_mask, other=0)
                    acc = multiply(x, w, acc, INTEGER, PRECISION)
    WIDTH: tl.constexpr = BLOCK_N // EPILOGUE_PARTS
    for part in tl.static_range(EPILOGUE_PARTS):
        column = tile_n * BLOCK_N + part * WIDTH + tl.arange(0, WIDTH)[None, :]
        finish_conv_tile(
            slice_of(acc, part, EPILOGUE_PARTS),
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
            group * N + column,
            m[:, None] < M,
            column < N,
            GROUPS * N,
            ACTIVATION,
            QUANTIZE,
        )


def plan_implicit(call: ConvCall, config: ImplicitConfig | None = None) -> list[Launch]:
    """The launch that writes ``call.out``."""
    config = config or TUNED.choose(call.problem())
    tile, groups = config.tile, call.geometry.groups
    n, c = call.columns, call.geometry.group_channels
    args, window = window_launch(call, c, n, call.weight)
    args["c_units"] = c // window["UNIT_C"]
    constants = {
        "GROUPS": groups,
        **window,
        "FLAT": config.flat,
        "EVEN_C": c % tile.block_k == 0,
        "GROUP_M": GROUP_M,
        **call.constants(),
        **tile.constants(),
    }
    grid = (triton.cdiv(call.rows, tile.block_m) * triton.cdiv(n, tile.block_n), groups)
    return [Launch(implicit_kernel, grid, args, constants, tile.num_warps, tile.num_stages)]


conv2d_fused, int8_conv2d_fused = operators(plan_implicit)
