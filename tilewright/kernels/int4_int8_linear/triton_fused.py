"""Linear layer on int4 weights and int8 activations (W4A8): a launch that quantises the rows of x, then the product.

    y[m, n] = activation(s_x[m] * sum_g s[n, g] * P_g[n, m] + b[n]) + r[m, n]
    P_g[n, m] = sum over the columns k of group g of (u[n, k] - z[n, g]) * q[m, k]

q int8 [M, K] and s_x float32 [M] from ``quantize_per_row``; weight, scale and zero in the order of ``triton.spans``; b
[N]; r [M, N] of any strides; y [M, N] fp16, bf16 or fp32. u - z is widened to int8 in registers and every P is an
exact int32: 128 columns add up to at most 243,840, and a whole row, which is one P, may have a million columns.

    small   M <= 16   K is cut into parts until the programs fill the GPU; a second kernel adds the parts in order
    middle  M <= 64   wider batch tiles; K is cut alike
    wide    M <= 256  K is cut where the tiles of one batch tile would leave multiprocessors idle
    large             batch tiles of 128 (of 64 where K is no multiple of 128, and on sm_90), K whole

How K is cut depends on N, K and the GPU, never on M, so within a family a row's result is the same whatever the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.epilogue import End
from tilewright.kernels.matrices import FLOAT_DTYPES, as_matrix
from tilewright.kernels.quantize.triton_quantize import quantize_per_row
from tilewright.kernels.triton.common import inline_ptx_by_default, named_kernel, why_not_on_gpu
from tilewright.kernels.triton.linear import run_linear
from tilewright.kernels.triton.spans import SPAN, kernel_order, span_count, why_no_spans
from tilewright.kernels.triton.split_k import choose_split
from tilewright.kernels.triton.tiles import (
    SHARED_SOURCES,
    TileConfig,
    plan_span_product,
    programs_for,
    span_product,
    tile_candidates,
    why_not_tile,
)
from tilewright.kernels.tuning import tunable

WIDE_M = 256
#: A product of a signed byte and u - z is at most 127 * 15 = 1905 in magnitude: a whole row of these stays inside
#: int32.
LARGEST_WHOLE_ROW = (2**31 - 1) // 1905


@dataclass(frozen=True)
class Int4Int8Config(TileConfig):
    """One way to launch the kernel, see ``TileConfig``."""

    @classmethod
    def for_problem(cls, problem: Problem) -> Int4Int8Config:
        """Batch tile by M; parts of K by N, K and the GPU alone, and none in the large family."""
        # The masks of a ragged K take the registers that a batch tile of 128 needs for its sums.
        tiles = TILES if problem.k % SPAN == 0 else TILES[:-1]
        if problem.is_hopper:
            tiles = TILES[:-1]
        config = next((c for c in tiles if problem.m <= c.block_m), tiles[-1]).for_chip(problem)
        if problem.m > WIDE_M:
            return config.within_limits(problem)
        splits = choose_split(programs_for(problem), triton.cdiv(problem.n, config.block_n), span_count(problem.k))
        return replace(config, splits=splits).within_limits(problem)


#: By batch tile: the small family, then the others.
TILES = (
    Int4Int8Config(block_n=128, block_m=16, num_warps=4, num_stages=4),
    Int4Int8Config(block_n=128, block_m=32, num_warps=4, num_stages=4),
    Int4Int8Config(block_n=128, block_m=64, num_warps=8, num_stages=4),
    Int4Int8Config(block_n=128, block_m=128, num_warps=8, num_stages=4),
)
#: Every kernel the heuristic can choose: each tile, with K whole and cut.
CONFIGS = [replace(config, splits=splits) for config in (*TILES, replace(TILES[-2], num_warps=4)) for splits in (1, 2)]


def why_not_config(config: Int4Int8Config, problem: Problem) -> str | None:
    """The reason why a launch with ``config`` cannot serve ``problem``, or does so wastefully for sure; or None."""
    if problem.m > WIDE_M and config.splits > 1:
        return "a large batch fills the GPU without cutting K"
    return why_not_tile(config, problem, 1)


TUNED = tunable(
    __name__,
    Int4Int8Config.for_problem,
    lambda problem: tile_candidates(Int4Int8Config, problem),
    why_not_config,
    shares=SHARED_SOURCES,
)


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None."""
    group_size = problem.group_size or problem.k
    reason = why_not_on_gpu(problem) or why_no_spans(problem.k, group_size)
    if reason is not None:
        return reason
    if problem.x_dtype not in FLOAT_DTYPES:
        return f"takes float16, bfloat16 and float32, not {problem.x_dtype}"
    if group_size >= problem.k > LARGEST_WHOLE_ROW:
        return f"a group of {problem.k} columns can pass int32; the longest that cannot has {LARGEST_WHOLE_ROW}"
    return None


int4_int8_linear_kernel = named_kernel(span_product, "int4_int8_linear_kernel")


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
    """See the reference. Raises ValueError for groups that are neither a multiple of 32 nor the whole row."""
    n, k = len(weight_packed), x.shape[-1]

    def launches(out: torch.Tensor, **end: Unpack[End]) -> list[Launch]:
        x_q, x_scale = quantize_per_row(x, channel_scale)
        facts: dict[str, Any] = {"group_size": group_size, "symmetric": weight_zero is None, **device_facts(x.device)}
        config = TUNED.choose(Problem("int4_int8_linear", len(out), n, k, x.dtype, **facts))
        rows, scale = as_matrix(x_q), x_scale.reshape(-1)
        weight = kernel_order(weight_packed, weight_scale, weight_zero, group_size, k)
        inline_ptx, kernel = inline_ptx_by_default(x.device), int4_int8_linear_kernel
        return plan_span_product(kernel, rows, scale, weight, out, torch.int8, config, inline_ptx, **end)

    return run_linear(x, n, x.dtype, launches, **end)
