"""Linear layer on int4 weights and float activations (W4A16) in one pass over the weight, for batches up to 384.

    y[m, n] = activation(sum_g s[n, g] * sum_{k in g} x[m, k] * (u[n, k] - z[n, g]) + b[n]) + r[m, n]

x [M, K] fp16, bf16 or fp32 with unit stride along K, rounded on load to ``compute_dtype``; weight, scale and zero in
the order of ``triton.spans``; b [N]; r [M, N] of any strides; y [M, N] in the dtype of x. u - z is exact in every
compute_dtype and sums are float32, so the one rounding before the final cast is that of x. A compute_dtype of fp32
multiplies in IEEE fp32.

    small   M <= 16   bound by the weight's bytes: K is cut into parts until the programs fill the GPU twice over.
                      Parts go to a float32 workspace; a second kernel adds them in ascending order and finishes.
    middle  M <= 64   wider batch tiles, so that each widened weight serves more rows; K is cut alike.
    wide    M <= 384  several batch tiles; K is cut only where those of one would leave multiprocessors idle.

How K is cut depends on N, K and the GPU, never on M, so within a family a row's result is the same whatever the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem, device_facts, rows_aligned
from tilewright.kernels.epilogue import End
from tilewright.kernels.matrices import FLOAT_DTYPES, rows_of
from tilewright.kernels.triton.common import inline_ptx_by_default, named_kernel, why_not_on_gpu
from tilewright.kernels.triton.linear import run_linear
from tilewright.kernels.triton.spans import kernel_order, span_count, why_no_spans
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

#: On an H200, to dequantise and call the library overtakes at about 400 rows (8192 x 8192).
LARGEST_M = 384
#: Groups of 32 scale sums four times as often as groups of 128, and fp32 products run outside the tensor cores.
LARGEST_M_SMALL_GROUPS = 128
LARGEST_M_FLOAT32 = 64


@dataclass(frozen=True)
class FusedConfig(TileConfig):
    """One way to launch the kernel, see ``TileConfig``."""

    @classmethod
    def for_problem(cls, problem: Problem) -> FusedConfig:
        """Batch tile by M; parts of K by N, K and the GPU alone."""
        if problem.multiply_dtype == torch.float32:
            config = FLOAT32
        else:
            config = next((c for c in TENSOR_CORE if problem.m <= c.block_m), TENSOR_CORE[-1]).for_chip(problem)
        splits = choose_split(programs_for(problem), triton.cdiv(problem.n, config.block_n), span_count(problem.k))
        return replace(config, splits=splits).within_limits(problem)


#: By batch tile: the small family, then the others. 128 output features to a tile, because every row of tiles reads
#: all of x again from the L2 cache: at M = 64, tiles of 64 would move more bytes of x there than bytes of weights from
#: memory. A batch tile of 128 spills registers on sm_80 to sm_90, and on sm_100 its four sums of a step, side by side,
#: exceed the 512 columns of tensor memory.
TENSOR_CORE = (
    FusedConfig(block_n=128, block_m=16, num_warps=4, num_stages=4),
    FusedConfig(block_n=128, block_m=32, num_warps=4, num_stages=4),
    FusedConfig(block_n=128, block_m=64, num_warps=8, num_stages=3),
)
#: Without tensor cores both operands go through shared memory; of nine shapes this one had the fewest bank conflicts.
FLOAT32 = FusedConfig(block_n=64, block_m=16, num_warps=2, num_stages=2)
#: Every kernel the heuristic can choose: each tile, with K whole and cut.
TILES = (*TENSOR_CORE, replace(TENSOR_CORE[-1], num_warps=4), FLOAT32)
CONFIGS = [replace(config, splits=splits) for config in TILES for splits in (1, 2)]


def why_not_config(config: FusedConfig, problem: Problem) -> str | None:
    """The reason why a launch with ``config`` cannot serve ``problem``, or does so wastefully for sure; or None."""
    return why_not_tile(config, problem, problem.multiply_dtype.itemsize)


TUNED = tunable(
    __name__,
    FusedConfig.for_problem,
    lambda problem: tile_candidates(FusedConfig, problem),
    why_not_config,
    shares=SHARED_SOURCES,
)


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None."""
    group_size = problem.group_size or problem.k
    reason = why_not_on_gpu(problem) or why_no_spans(problem.k, group_size)
    if reason is not None:
        return reason
    if problem.x_dtype not in FLOAT_DTYPES or problem.multiply_dtype not in FLOAT_DTYPES:
        return f"takes float16, bfloat16 and float32, not {problem.x_dtype} multiplied in {problem.multiply_dtype}"
    limit = LARGEST_M
    if problem.multiply_dtype == torch.float32:
        limit = LARGEST_M_FLOAT32
    elif group_size < min(64, problem.k):
        limit = LARGEST_M_SMALL_GROUPS
    if problem.m > limit:
        return f"for batches up to {limit}, this one has {problem.m} rows"
    return None


int4_linear_kernel = named_kernel(span_product, "int4_linear_kernel")


def int4_linear(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None = None,
    *,
    group_size: int,
    compute_dtype: torch.dtype | None = None,
    **end: Unpack[End],
) -> torch.Tensor:
    """See the reference. Raises ValueError for groups that are neither a multiple of 32 nor the whole row."""
    n, k = len(weight_packed), x.shape[-1]

    def launches(out: torch.Tensor, **end: Unpack[End]) -> list[Launch]:
        rows = rows_of(x)
        facts: dict[str, Any] = {"group_size": group_size, "symmetric": weight_zero is None}
        facts |= {"compute_dtype": compute_dtype, "aligned": rows_aligned(rows), **device_facts(x.device)}
        problem = Problem("int4_linear", len(rows), n, k, x.dtype, **facts)
        weight = kernel_order(weight_packed, weight_scale, weight_zero, group_size, k)
        how = (problem.multiply_dtype, TUNED.choose(problem), inline_ptx_by_default(x.device))
        return plan_span_product(int4_linear_kernel, rows, None, weight, out, *how, **end)

    return run_linear(x, n, x.dtype, launches, **end)
