"""What W4A16 and W4A8 share: the product of one tile, the kernel around it, and how its launches are planned.

A tile is held transposed, T[n, m] = sum_k w[n, k] * x[m, k]: the weight is the left operand. On sm_90 that is the one
``wgmma`` takes from registers, so widened weights never travel through shared memory, and the batch is the operand
whose tile may be as small as 16.

    P_g[n, m] = sum over the columns k of group g of (u[n, k] - 8) * x[m, k]    tensor cores, float32 or int32
    X_g[m]    = sum over the columns k of group g of x[m, k]                    float32 or int32
    T[n, m]   = sum_g s[n, g] * (P_g[n, m] + (8 - z[n, g]) * X_g[m])            float32

The weight lies in the order of ``spans.py``; a step of the loop takes a span of 128 columns, so a longer group is a
sum of several P. A group's scale multiplies its sum instead of its weights: fewer instructions while the batch tile is
narrower than half a group, and one rounding less for each weight. So does its zero point, which is left out where every
one is 8: an operand that is the same function of each word goes from the pipeline's buffer into the registers of the
matrix instruction, any other through shared memory once more (``nibbles``). Products in float32, which have no
matrix instruction, subtract z from each weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import End
from tilewright.kernels.triton.common import TRITON_DTYPES, finish_tile
from tilewright.kernels.triton.nibbles import centred_nibble
from tilewright.kernels.triton.spans import QUARTER, SPAN, SpanWeight, span_count
from tilewright.kernels.triton.split_k import plan_cut_product, store_part
from tilewright.kernels.tuning import why_too_large

WHOLE_ROW = tl.constexpr(0)  # value of QUARTERS_PER_GROUP when one group is the whole row
_QUARTER = tl.constexpr(QUARTER)
_SPAN = tl.constexpr(SPAN)
MOST_STEPS_APART = 4
#: The most rows of a batch that K is cut for as if it were one tile.
MIDDLE_M = 64
#: Rows beyond which there are three tiles of the batch at least.
MANY_M = 128
_Config = TypeVar("_Config", bound="TileConfig")


@dataclass(frozen=True)
class TileConfig:
    """block_n, block_m: output features and rows of x of a tile. splits: parts that K is cut into, at most."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int
    splits: int = 1

    def for_chip(self: _Config, problem: Problem) -> _Config:
        """Four warps for a batch tile of 64 where ``wgmma`` takes 64 features from one warp group: on an H200, with
        groups of 128, two warp groups were 6 to 15 % slower. Elsewhere four do not have the registers for its sums, nor
        for more scales in a span or the masks of a ragged one.
        """
        simple = problem.k % SPAN == 0 and (problem.group_size or problem.k) >= SPAN
        return replace(self, num_warps=4) if problem.is_hopper and self.block_m == 64 and simple else self

    def within_limits(self: _Config, problem: Problem) -> _Config:
        """Two stages on AMD, whose 64 KiB of local memory hold no more."""
        return self if problem.gpu_arch is None else replace(self, num_stages=2)


#: Modules that the speed of both fused kernels depends on.
SHARED_SOURCES = tuple(f"tilewright.kernels.triton.{name}" for name in ("tiles", "nibbles", "spans"))


def programs_for(problem: Problem) -> int:
    """How many programs K is cut for, were there one tile of rows: two for each multiprocessor while there is one, one
    for up to two tiles, and half a one beyond, where the batch itself makes programs enough.
    """
    multiprocessors = problem.multiprocessors or 132
    if problem.m > MANY_M:
        return multiprocessors // 2
    return (2 if problem.m <= MIDDLE_M else 1) * multiprocessors


def tile_candidates(kind: type[_Config], problem: Problem) -> Iterator[_Config]:
    """Tiles worth timing: batch tiles that the batch fills at least by half, and the next smaller one."""
    full = min(max(triton.next_power_of_2(problem.m), 16), 128)
    stages = (2,) if problem.gpu_arch is not None else (2, 3, 4, 5)
    for block_m in (size for size in (16, 32, 64, 128) if full // 2 <= size <= full):
        for block_n, num_warps in ((64, 4), (128, 4), (128, 8)):
            for num_stages, splits in itertools.product(stages, (1, 2, 4, 8)):
                yield kind(block_n, block_m, num_warps, num_stages, splits)


def why_not_tile(config: TileConfig, problem: Problem, x_bytes: int) -> str | None:
    """What every fused kernel refuses. x_bytes: of one activation as it is multiplied."""
    if config.splits > 1 and config.splits * MOST_STEPS_APART > span_count(problem.k):
        return f"parts of less than {MOST_STEPS_APART} steps do not fill the pipeline of loads"
    if problem.gpu_arch is not None and config.num_stages > 2:
        return "64 KiB of local memory hold two stages"
    tile = config.block_n * QUARTER * 2 + config.block_m * SPAN * x_bytes
    return why_too_large(problem, tile, config.num_stages)


@triton.jit
def _quarter_of_x(x_rows, start, K, DTYPE: tl.constexpr, EVEN_K: tl.constexpr):
    """Columns start .. start + 31 of a tile of x, as [BM, 32]."""
    column = start + tl.arange(0, _QUARTER)[None, :]
    if EVEN_K:
        x = tl.load(x_rows + column)
    else:
        x = tl.load(x_rows + column, mask=column < K, other=0)
    return x.to(DTYPE)


@triton.jit
def _scale_of(words, SCALE: tl.constexpr):
    """The float32 scale of each entry of ``spans.py``'s scale."""
    if tl.float32 == SCALE:
        return words
    else:
        return (words >> 16).to(tl.int16).to(SCALE, bitcast=True).to(tl.float32)


@triton.jit
def _shift_of(words, zero_ptr, offset, SCALE: tl.constexpr):
    """int32 8 - z of the entries that ``words`` were loaded from."""
    if tl.float32 == SCALE:
        return 8 - tl.load(zero_ptr + offset)
    else:
        return 8 - (words & 15)


def span_product(
    x_ptr,
    x_scale_ptr,
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
    """One tile of out, or with a workspace one part of its sum before s_x. x_scale may be None.

    x [M, K] has unit stride along K. SCALE: dtype of the canonical scale. DTYPE: what both operands are widened to, and
    int8 multiplies into int32.
    """
    SUM: tl.constexpr = tl.int32 if tl.int8 == DTYPE else tl.float32
    # Consecutive quarters of a span that lie in one group.
    RUN: tl.constexpr = 4 if QUARTERS_PER_GROUP % 4 == 0 else (2 if QUARTERS_PER_GROUP % 2 == 0 else 1)
    IS_FLOAT32: tl.constexpr = tl.float32 == DTYPE
    part = tl.program_id(1)
    row = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part * spans_per_part
    last = tl.minimum(first + spans_per_part, spans)
    # Rows and columns past the end repeat the last one.
    x_rows = x_ptr + tl.minimum(row, M - 1).to(tl.int64)[:, None] * stride_xm
    inner = tl.minimum(column, N - 1).to(tl.int64)
    word = tl.arange(0, _QUARTER)[None, :]
    weight_rows = weight_ptr + inner[:, None] * stride_weight + word
    group = inner
    if QUARTERS_PER_GROUP == WHOLE_ROW:
        total = tl.zeros((BLOCK_N, BLOCK_M), SUM)
        x_total = tl.zeros((BLOCK_M,), SUM)
    else:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # With a number of stages of its own, the loop pipelines all of its loads, not only those of the dots' operands: a
    # scale that is asked for when it is needed takes longer to come than the span takes to multiply.
    for span in tl.range(first, last, num_stages=NUM_STAGES):
        words = tl.load(weight_rows + span * _QUARTER)
        for start in tl.static_range(0, 4, RUN):
            if QUARTERS_PER_GROUP != WHOLE_ROW:
                group = (span * 4 + start) // QUARTERS_PER_GROUP * N + inner
                scale_words = tl.load(scale_ptr + group)
            run = tl.zeros((BLOCK_N, BLOCK_M), SUM)
            x_sums = tl.zeros((BLOCK_M, _QUARTER), SUM)
            for quarter in tl.static_range(start, start + RUN):
                x = _quarter_of_x(x_rows, span * _SPAN + quarter * _QUARTER, K, DTYPE, EVEN_K)
                if IS_FLOAT32:
                    w = ((words >> (quarter * 4)) & 15).to(tl.float32) - 8.0
                else:
                    w = centred_nibble(words, quarter, DTYPE, INLINE_PTX)
                run = tl.dot(w, x.trans(), run, input_precision="ieee", out_dtype=SUM)
                if not SYMMETRIC:
                    x_sums += x.to(SUM)
            if QUARTERS_PER_GROUP == WHOLE_ROW:
                total += run
                if not SYMMETRIC:
                    x_total += tl.sum(x_sums, 1)
            else:
                if not SYMMETRIC:
                    shift = _shift_of(scale_words, zero_ptr, group, SCALE).to(SUM)
                    run += shift[:, None] * tl.sum(x_sums, 1)[None, :]
                total += run.to(tl.float32) * _scale_of(scale_words, SCALE)[:, None]
    if QUARTERS_PER_GROUP == WHOLE_ROW:
        scale_words = tl.load(scale_ptr + inner)
        if not SYMMETRIC:
            shift = _shift_of(scale_words, zero_ptr, inner, SCALE).to(SUM)
            total += shift[:, None] * x_total[None, :]
        y = total.to(tl.float32) * _scale_of(scale_words, SCALE)[:, None]
    else:
        y = total
    if workspace_ptr is not None:
        store_part(y, workspace_ptr, part, row, column, M, N)
    else:
        if x_scale_ptr is not None:
            y *= tl.load(x_scale_ptr + row, mask=row < M, other=0.0)[None, :]
        row, column = row[None, :], column[:, None]
        finish_tile(
            y, out_ptr, bias_ptr, residual_ptr, row, column, M, N, stride_residual_m, stride_residual_n, ACTIVATION
        )


def plan_span_product(
    kernel: Any,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: SpanWeight,
    out: torch.Tensor,
    multiply_dtype: torch.dtype,
    config: TileConfig,
    inline_ptx: bool,
    **end: Unpack[End],
) -> list[Launch]:
    """The launches that fill ``out`` [M, N]: the product, and the sum over parts where K is cut.

    kernel: of ``span_product``. x [M, K] with unit stride along K, x_scale float32 [M] or None, bias [N] contiguous,
    residual [M, N].
    """
    args = {
        "x_scale_ptr": x_scale,
        "weight_ptr": weight.weight,
        "scale_ptr": weight.scale,
        "zero_ptr": weight.zero,
        "K": weight.k,
        "stride_xm": x.stride(0),
        "stride_weight": weight.weight.shape[1],
    }
    constants = {
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "QUARTERS_PER_GROUP": weight.quarters_per_group or WHOLE_ROW.value,
        "SYMMETRIC": weight.symmetric,
        "SCALE": TRITON_DTYPES[weight.scale_dtype],
        "DTYPE": TRITON_DTYPES[multiply_dtype],
        "EVEN_K": weight.k % SPAN == 0,
        "NUM_STAGES": config.num_stages,
        "INLINE_PTX": inline_ptx,
    }
    spans = {"spans": span_count(weight.k)}
    return plan_cut_product(kernel, x, out, config, spans, torch.float32, args, constants, **end)
