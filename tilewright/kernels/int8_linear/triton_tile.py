"""W8A8 linear layer for large batches in Triton: one tile of y for each program.

    y[m, n] = activation(s_x[m] * s_w[n] * sum_k x[m, k] * w[n, k] + b[n]) + r[m, n]

x int8 [M, K] and w int8 [N, K], rows contiguous; s_x float32 [M]; s_w [N]; b [N]; r [M, N] of any strides; y [M, N].

Both operands lie along K, as the warp-group matrix instruction wants int8. The int32 sums never leave the registers:
the epilogue scales them and writes y once. Programs walk the tiles in groups of rows so that neighbours share the
cache. Takes any batch; up to ``triton_swapped.MAX_M`` that kernel is faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import End
from tilewright.kernels.int8_linear.triton_operators import operators, product_problem, why_not_int8_product
from tilewright.kernels.triton.common import finish_arguments, finish_tile, grouped_tile, slice_of
from tilewright.kernels.tuning import tunable, why_too_large

GROUP_M = 8
TILE_SIZES = ((64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (128, 256), (256, 128))


@dataclass(frozen=True)
class TileConfig:
    """block_m rows of the batch x block_n features, block_k of the sum at a time.

    epilogue_parts: 1, 2 or 4 slices of the tile that the epilogue takes one after another. The accumulators of the big
    tile fill half of the registers: scaling, activating and adding a residual to all of them at once spills.
    """

    block_m: int
    block_n: int
    block_k: int
    epilogue_parts: int
    num_warps: int
    num_stages: int

    @classmethod
    def for_problem(cls, problem: Problem) -> TileConfig:
        """The largest tile that still gives every multiprocessor one, within the chip's shared memory."""
        if problem.gpu_arch is not None:
            return AMD_TILE
        multiprocessors = problem.multiprocessors or 132
        tiles = triton.cdiv(problem.m, BIG_TILE.block_m) * triton.cdiv(problem.n, BIG_TILE.block_n)
        if tiles >= multiprocessors:
            return BIG_TILE if BIG_TILE.suits(problem) else BIG_TILE_MMA_SYNC
        tiles = triton.cdiv(problem.m, MIDDLE_TILE.block_m) * triton.cdiv(problem.n, MIDDLE_TILE.block_n)
        return MIDDLE_TILE if tiles >= multiprocessors else SMALL_TILE

    def suits(self, problem: Problem) -> bool:
        """Whether ``for_problem`` may choose this config on the device of ``problem``."""
        if problem.gpu_arch is not None or self == AMD_TILE:
            return problem.gpu_arch is not None and self == AMD_TILE
        # Only on 9.x does Triton multiply int8 with wgmma; 10.x and 12.x get mma.sync, as 8.x does.
        wgmma = problem.capability is None or problem.capability[0] == 9
        return {BIG_TILE: wgmma, BIG_TILE_MMA_SYNC: not wgmma}.get(self, True)


BIG_TILE = TileConfig(128, 256, 128, epilogue_parts=4, num_warps=8, num_stages=3)
# mma.sync takes its operands from registers: half the depth, or they spill. Fits into the 99 KB of 8.6, 8.9 and 12.x.
BIG_TILE_MMA_SYNC = TileConfig(128, 256, 64, epilogue_parts=4, num_warps=8, num_stages=4)
MIDDLE_TILE = TileConfig(128, 128, 128, epilogue_parts=2, num_warps=8, num_stages=3)
SMALL_TILE = TileConfig(64, 128, 128, epilogue_parts=2, num_warps=4, num_stages=4)
AMD_TILE = TileConfig(128, 128, 64, epilogue_parts=1, num_warps=8, num_stages=2)
CONFIGS = [BIG_TILE, BIG_TILE_MMA_SYNC, MIDDLE_TILE, SMALL_TILE, AMD_TILE]


def candidates(problem: Problem) -> Iterator[TileConfig]:
    """Tiles of 64 to 256 each way. Large ones finish in slices, see ``epilogue_parts``."""
    stages = (AMD_TILE.num_stages,) if problem.gpu_arch is not None else (3, 4)
    for (block_m, block_n), block_k, num_stages in itertools.product(TILE_SIZES, (64, 128), stages):
        for num_warps in (4, 8):
            parts = min(max(block_m * block_n // (32 * 32 * num_warps), 1), 4)
            yield TileConfig(block_m, block_n, block_k, 1 if parts == 3 else parts, num_warps, num_stages)


def why_not_config(config: TileConfig, problem: Problem) -> str | None:
    """The reason why a launch with ``config`` cannot serve ``problem``, or does so wastefully for sure; or None."""
    sums = config.block_m * config.block_n // (32 * config.num_warps)
    if sums > 128:
        return f"a thread would hold {sums} sums, which leaves no registers for anything else"
    return why_too_large(problem, (config.block_m + config.block_n) * config.block_k, config.num_stages)


TUNED = tunable(__name__, TileConfig.for_problem, candidates, why_not_config)
why_not = why_not_int8_product


@triton.jit(do_not_specialize=["M"])
def tile_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_residual_m,
    stride_residual_n,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    EPILOGUE_PARTS: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of out [M, N]."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + m[:, None].to(tl.int64) * stride_xm + k[None, :]
    w_tile = w_ptr + n[:, None].to(tl.int64) * stride_wn + k[None, :]
    m_mask = m[:, None] < M
    n_mask = n[:, None] < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_tile, mask=m_mask, other=0)
            w = tl.load(w_tile, mask=n_mask, other=0)
        else:
            k_mask = (start + k)[None, :] < K
            x = tl.load(x_tile, mask=m_mask & k_mask, other=0)
            w = tl.load(w_tile, mask=n_mask & k_mask, other=0)
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    row = m[:, None]
    x_scale = tl.load(x_scale_ptr + row, mask=row < M, other=0.0)
    # In slices one after another: scaling, activating and adding a residual to the whole tile at once spills.
    WIDTH: tl.constexpr = BLOCK_N // EPILOGUE_PARTS
    for part in tl.static_range(EPILOGUE_PARTS):
        column = tile_n * BLOCK_N + part * WIDTH + tl.arange(0, WIDTH)[None, :]
        w_scale = tl.load(w_scale_ptr + column, mask=column < N, other=0.0).to(tl.float32)
        y = slice_of(acc, part, EPILOGUE_PARTS).to(tl.float32) * x_scale * w_scale
        finish_tile(
            y, out_ptr, bias_ptr, residual_ptr, row, column, M, N, stride_residual_m, stride_residual_n, ACTIVATION
        )


def plan_tile(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out: torch.Tensor,
    config: TileConfig | None = None,
    **end: Unpack[End],
) -> list[Launch]:
    """The launch that writes ``out`` [M, N]; x [M, K] and weight [N, K] int8 with contiguous rows."""
    (m, k), n = x.shape, weight.shape[0]
    config = config or TUNED.choose(product_problem(x, n))
    args = {
        "x_ptr": x,
        "x_scale_ptr": x_scale,
        "w_ptr": weight,
        "w_scale_ptr": weight_scale,
        **finish_arguments(out, **end),
        "M": m,
        "N": n,
        "K": k,
        "stride_xm": x.stride(0),
        "stride_wn": weight.stride(0),
    }
    constants = {
        "ACTIVATION": end["activation"],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": GROUP_M,
        "EVEN_K": k % config.block_k == 0,
        "EPILOGUE_PARTS": config.epilogue_parts,
    }
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    return [Launch(tile_kernel, grid, args, constants, config.num_warps, config.num_stages)]


int8_linear, int8_linear_quantized = operators(plan_tile)
