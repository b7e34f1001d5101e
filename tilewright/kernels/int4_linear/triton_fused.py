"""Linear layer on int4 weights and float activations (W4A16) in one pass over the weight, for batches up to 384.

    y[m, n] = activation(sum_g s[n, g] * sum_{k in g} x[m, k] * (u[n, k] - z[n, g]) + b[n]) + r[m, n]

x [M, K] fp16, bf16 or fp32 with unit stride along K, rounded on load to ``compute_dtype``; weight, scale and zero in
the order of ``layout.py``; b [N]; r [M, N] of any strides; y [M, N] in the dtype of x. u - z is exact in every
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

import torch
import triton
import triton.language as tl

from tilewright.aot.launch import Launch
from tilewright.kernels.activation import check_activation
from tilewright.kernels.dispatch.problem import Problem, device_facts, rows_aligned
from tilewright.kernels.int4_linear.layout import SpanWeight, kernel_order, span_count, why_no_spans
from tilewright.kernels.triton.common import FLOAT_DTYPES, as_matrix, finish_tile, why_not_on_gpu
from tilewright.kernels.triton.split_k import choose_split
from tilewright.kernels.triton.tiles import (
    SHARED_SOURCES,
    TRITON_DTYPES,
    TileConfig,
    Tiling,
    finish_arguments,
    inline_ptx_by_default,
    multiply_spans,
    plan_sum_parts,
    programs_for,
    rows_of,
    span_arguments,
    store_part,
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


@triton.jit(do_not_specialize=["M"])
def int4_linear_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    workspace_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_weight,
    stride_residual_m,
    stride_residual_n,
    spans,
    spans_per_part,
    tiles_m,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    QUARTERS_PER_GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INLINE_PTX: tl.constexpr,
):
    """One tile of out, or with a workspace one part of its sum."""
    part = tl.program_id(1)
    row = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part * spans_per_part
    total = multiply_spans(
        x_ptr,
        weight_ptr,
        scale_ptr,
        zero_ptr,
        row,
        column,
        first,
        tl.minimum(first + spans_per_part, spans),
        M,
        N,
        K,
        stride_xm,
        stride_weight,
        QUARTERS_PER_GROUP,
        SYMMETRIC,
        SCALE,
        DTYPE,
        EVEN_K,
        NUM_STAGES,
        INLINE_PTX,
    )
    if workspace_ptr is not None:
        store_part(total, workspace_ptr, part, row, column, M, N)
    else:
        finish_tile(
            total,
            out_ptr,
            bias_ptr,
            residual_ptr,
            row[None, :],
            column[:, None],
            M,
            N,
            stride_residual_m,
            stride_residual_n,
            ACTIVATION,
        )


def plan_int4_linear(
    x: torch.Tensor,
    weight: SpanWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    *,
    activation: str,
    compute_dtype: torch.dtype,
    config: FusedConfig,
    inline_ptx: bool,
) -> list[Launch]:
    """The launches that fill ``out`` [M, N]: the product, and the sum over parts where K is cut.

    x [M, K] with unit stride along K, bias [N] contiguous, residual [M, N].
    """
    tiling = Tiling.of(len(x), weight, config)
    workspace = None
    if tiling.parts > 1:
        workspace = torch.empty((tiling.parts, *out.shape), dtype=torch.float32, device=out.device)
    weight_args, weight_constants = span_arguments(weight)
    args = {
        "x_ptr": x,
        "workspace_ptr": workspace,
        "M": len(x),
        "stride_xm": x.stride(0),
        "spans_per_part": tiling.spans_per_part,
        "tiles_m": tiling.tiles_m,
        **weight_args,
        **finish_arguments(bias, residual, out),
    }
    constants = {
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "NUM_STAGES": config.num_stages,
        "DTYPE": TRITON_DTYPES[compute_dtype],
        "ACTIVATION": activation,
        "INLINE_PTX": inline_ptx,
        **weight_constants,
    }
    product = Launch(int4_linear_kernel, tiling.grid, args, constants, config.num_warps, config.num_stages)
    if workspace is None:
        return [product]
    return [product, plan_sum_parts(workspace, None, bias, residual, out, activation)]


def int4_linear(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    group_size: int,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See the reference. Raises ValueError for groups that are neither a multiple of 32 nor the whole row."""
    check_activation(activation)
    n, k = len(weight_packed), x.shape[-1]
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    rows = rows_of(x)
    problem = Problem(
        "int4_linear",
        m=out.numel() // n,
        n=n,
        k=k,
        x_dtype=x.dtype,
        group_size=group_size,
        symmetric=weight_zero is None,
        compute_dtype=compute_dtype,
        aligned=rows_aligned(rows),
        **device_facts(x.device),
    )
    launches = plan_int4_linear(
        rows,
        kernel_order(weight_packed, weight_scale, weight_zero, group_size, k),
        None if bias is None else bias.contiguous(),
        None if residual is None else as_matrix(residual.expand(out.shape)),
        as_matrix(out),
        activation=activation,
        compute_dtype=problem.multiply_dtype,
        config=TUNED.choose(problem),
        inline_ptx=inline_ptx_by_default(x.device),
    )
    for launch in launches:
        launch.run()
    return out
