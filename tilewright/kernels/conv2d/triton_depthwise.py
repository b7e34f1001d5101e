"""Depthwise convolution in Triton: every output channel looks at one input channel, so nothing is a matrix product.

    y[m, o] = finish(sum_{i, j} x[n, p s_h + i d_h - top, q s_w + j d_w - left, o // F] * w[o, i, j])

x [N, H, W, C] float, int8 or uint8 with contiguous channels; F = Co / C output channels for each; w OHWI [Co, R, S, 1],
read as [R S, Co], which is made once for each weight, so that neighbouring threads read neighbouring channels; y
[M, Co]. Reading x is what takes the time: a program takes pixels next to each other, whose windows overlap in the L1
cache.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tilewright.aot.launch import Launch
from tilewright.kernels.conv2d.triton_epilogue import finish_conv_tile, load_signed, pixel
from tilewright.kernels.conv2d.triton_launch import (
    SHARED_SOURCES,
    ConvCall,
    operators,
    why_not_any_kernel,
    window_launch,
)
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.tuning import tunable


@dataclass(frozen=True)
class DepthwiseConfig:
    """block_m pixels x block_c output channels of one program."""

    block_m: int
    block_c: int
    num_warps: int

    @classmethod
    def for_problem(cls, problem: Problem) -> DepthwiseConfig:
        """About 16 sums for each thread: 64 channels are a 64-byte row of int8, 128 bytes of half precision."""
        block_c = min(max(triton.next_power_of_2(problem.n), 16), 64)
        return cls(block_m=2048 // block_c, block_c=block_c, num_warps=4)


choose = functools.lru_cache(maxsize=4096)(DepthwiseConfig.for_problem)


def candidates(problem: Problem) -> Iterator[DepthwiseConfig]:
    """Wide and narrow blocks, with 4 to 32 sums for each thread."""
    for block_c, num_warps, sums in itertools.product((16, 32, 64, 128), (4, 8), (4, 8, 16, 32)):
        block_m = sums * 32 * num_warps // block_c
        if 16 <= block_m <= 256:
            yield DepthwiseConfig(block_m, block_c, num_warps)


TUNED = tunable(__name__, choose, candidates, shares=SHARED_SOURCES)


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None."""
    if problem.conv is not None and not problem.conv.depthwise:
        return "takes as many groups as input channels, and more than one"
    return why_not_any_kernel(problem)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "pad_top", "pad_left"])
def depthwise_kernel(
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
    FACTOR: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    UNIT_C: tl.constexpr,
    UNIT_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    QUANTIZE: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_M pixels of BLOCK_C channels of out [M, N]. x_*_units: elements from one image, row, pixel to the next, /
    UNIT_C. FACTOR: output channels for each input channel.
    """
    N = n_units * UNIT_N
    tiles_n = tl.cdiv(N, BLOCK_C)
    m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles_n * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    n_mask = n < N
    image, p, q = pixel(m, P, Q)
    h0 = p * STRIDE_H - pad_top
    w0 = q * STRIDE_W - pad_left
    first = image.to(tl.int64) * x_image_units + h0.to(tl.int64) * x_row_units + w0.to(tl.int64) * x_pixel_units
    x_window = x_ptr + (first * UNIT_C)[:, None] + (n if FACTOR == 1 else n // FACTOR)
    TYPE: tl.constexpr = tl.int32 if INTEGER else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_C), TYPE)
    for i in range(R):
        h = h0 + i * DILATION_H
        row_mask = (m < M) & (h >= 0) & (h < H)
        x_row = x_window + tl.full((), DILATION_H * UNIT_C, tl.int64) * i * x_row_units
        for j in tl.static_range(S):
            w = w0 + j * DILATION_W
            inside = (row_mask & (w >= 0) & (w < W))[:, None] & n_mask
            x = load_signed(
                x_row + tl.full((), j * DILATION_W * UNIT_C, tl.int64) * x_pixel_units,
                inside,
                x_zero,
                w_sum_ptr is not None,
            )
            tap = tl.load(w_ptr + (i * S + j) * N + n, mask=n_mask, other=0)
            acc += x.to(TYPE) * tap.to(TYPE)
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
        n,
        m[:, None] < M,
        n_mask,
        N,
        ACTIVATION,
        QUANTIZE,
    )


def taps_first(weight: torch.Tensor) -> torch.Tensor:
    """OHWI [Co, R, S, 1] as [R S, Co]; made once for each weight."""

    def make() -> torch.Tensor:
        # A copy even where the transpose is contiguous already: what is kept must not share the weight's memory.
        return weight.detach().reshape(len(weight), -1).t().clone(memory_format=torch.contiguous_format)

    return packed(weight, f"conv depthwise {weight.dtype}", make)


def plan_depthwise(call: ConvCall, config: DepthwiseConfig | None = None) -> list[Launch]:
    """The launch that writes ``call.out``."""
    config = config or TUNED.choose(call.problem())
    n, c = call.geometry.out_channels, call.geometry.in_channels
    args, window = window_launch(call, c, n, taps_first(call.weight))
    shared = call.constants()
    constants = {
        "FACTOR": n // c,
        **window,
        **{name: shared[name] for name in ("ACTIVATION", "QUANTIZE", "INTEGER")},
        "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c,
    }
    grid = (triton.cdiv(call.rows, config.block_m) * triton.cdiv(n, config.block_c),)
    return [Launch(depthwise_kernel, grid, args, constants, config.num_warps)]


conv2d_fused, int8_conv2d_fused = operators(plan_depthwise)
