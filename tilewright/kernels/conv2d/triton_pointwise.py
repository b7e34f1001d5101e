"""1 x 1 convolution without padding in Triton: a matrix product over the channels of each pixel.

    y[m, o] = finish(sum_c x[row(m), c] * w[o, c])

x [N, H, W, C] float, int8 or uint8 with contiguous channels; w [Co, C]; y [M, Co] for M = N P Q. With stride 1 over an
image without gaps row(m) = m and nothing else is computed; else the image, row and column of each pixel are found once
for a tile. 36 of the 53 convolutions of a ResNet-50 are of this kind, with four fifths of the bytes.
"""

from __future__ import annotations

import functools
from dataclasses import replace

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
    unit,
    why_not_any_kernel,
    why_not_tile,
)
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.triton.common import grouped_tile, slice_of
from tilewright.kernels.tuning import tunable

GROUP_M = 8


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem) -> ConvTile:
    """The tile for ``problem``. A sum that is one step long has no loads to run ahead of."""
    tile = ConvTile.for_problem(problem, problem.k)
    return replace(tile, num_stages=1) if problem.k <= tile.block_k else tile


TUNED = tunable(
    __name__,
    choose,
    lambda problem: tile_candidates(choose(problem), problem, stages=(1, 2, 3, 4)),
    why_not_tile,
    shares=SHARED_SOURCES,
)


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None."""
    reason = why_not_any_kernel(problem)
    if reason is None and problem.conv is not None and not problem.conv.pointwise:
        reason = "takes windows of 1 x 1 without padding"
    if reason is None and problem.conv is not None and problem.conv.groups > 1:
        reason = "takes one group"
    return reason


@triton.jit(do_not_specialize=["M", "P", "Q"])
def pointwise_kernel(
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
    P,
    Q,
    n_units,
    k_units,
    x_image_units,
    x_row_units,
    x_pixel_units,
    DENSE: tl.constexpr,
    UNIT_K: tl.constexpr,
    UNIT_N: tl.constexpr,
    EVEN_K: tl.constexpr,
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
    """One tile of out [M, N]. x_*_units: elements between images, rows, pixels that are looked at, / UNIT_K."""
    N = n_units * UNIT_N
    K = k_units * UNIT_K
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if DENSE:
        first = m.to(tl.int64) * x_pixel_units
    else:
        image, p, q = pixel(m, P, Q)
        first = image.to(tl.int64) * x_image_units + p.to(tl.int64) * x_row_units + q.to(tl.int64) * x_pixel_units
    x_tile = x_ptr + (first * UNIT_K)[:, None] + k[None, :]
    w_tile = w_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    m_mask = m[:, None] < M
    n_mask = n[:, None] < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = load_signed(x_tile, m_mask, 0, False)
            w = tl.load(w_tile, mask=n_mask, other=0)
        else:
            k_mask = (start + k)[None, :] < K
            x = load_signed(x_tile, m_mask & k_mask, 0, False)
            w = tl.load(w_tile, mask=n_mask & k_mask, other=0)
        acc = multiply(x, w, acc, INTEGER, PRECISION)
        x_tile += BLOCK_K
        w_tile += BLOCK_K
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
            column,
            m_mask,
            column < N,
            N,
            ACTIVATION,
            QUANTIZE,
        )


def plan_pointwise(call: ConvCall, config: ConvTile | None = None) -> list[Launch]:
    """The launch that writes ``call.out``."""
    config = config or TUNED.choose(call.problem())
    geometry, x = call.geometry, call.x
    m, n, k = call.rows, call.columns, geometry.in_channels
    image, row, pixel_stride, _ = x.stride()
    row, pixel_stride = row * geometry.stride[0], pixel_stride * geometry.stride[1]
    p, q = geometry.out_height, geometry.out_width
    # Where there is one row or one image, the distance to the next is never used.
    dense = (p == 1 or row == q * pixel_stride) and (geometry.batch == 1 or image == p * q * pixel_stride)
    unit_k, unit_n = unit(k, pixel_stride, *(() if dense else (row, image))), unit(n)
    args = {
        "x_ptr": x,
        "w_ptr": call.weight,
        **call.epilogue(),
        "M": m,
        "P": p,
        "Q": q,
        "n_units": n // unit_n,
        "k_units": k // unit_k,
        "x_image_units": 0 if dense else image // unit_k,
        "x_row_units": 0 if dense else row // unit_k,
        "x_pixel_units": pixel_stride // unit_k,
    }
    constants = {
        "DENSE": dense,
        "UNIT_K": unit_k,
        "UNIT_N": unit_n,
        "EVEN_K": k % config.block_k == 0,
        "GROUP_M": GROUP_M,
        **call.constants(),
        **config.constants(),
    }
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    return [Launch(pointwise_kernel, grid, args, constants, config.num_warps, config.num_stages)]


conv2d_fused, int8_conv2d_fused = operators(plan_pointwise)
