"""Linear layer on int4 weights for batches up to 8, with the matrix instruction ``mma.sync`` issued through inline
assembly.

    y[m, n] = activation(sum_g s[n, g] * sum_{k in g} x[m, k] * (u[n, k] - z[n, g]) + b[n]) + r[m, n]

x [M, K] fp16 or bf16, K a multiple of 64; the weight in the order of ``fragments.py``; b [N]; r [M, N] of any strides;
y [M, N]. u - z is exact, and sums are float32.

A warp holds 16 output features and 8 rows of x in the registers of its threads, and every thread loads its own
registers: eight nibbles make one of them four operands (``triton_mma``). Nothing goes through shared memory, nothing is
converted, and no warp waits for another. Words of the next step, or the next two, are on their way while one is
multiplied; x is shared by all warps in the L1 cache. A step is 64 or 128 columns of one group, whose sum is multiplied
by its scale. With two tiles of 8 rows it was slower on an H200 than ``triton_fused``, which takes larger batches.

K is cut twice. The warps of a program that share a tile of features take its steps in turn, and their sums are added up
in shared memory at the end: the weight's bytes are asked for from many places at once, and it takes one launch. Parts
of K that are programs of their own leave their sums in a workspace, which a second launch adds in ascending order. Both
depend on N, K and the GPU alone, never on M.

The compiler does not know that the instruction works across a warp: see ``sparse24_linear.triton_fragments`` for what
must hold, which the launcher sees to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem, device_facts, rows_aligned
from tilewright.kernels.epilogue import End
from tilewright.kernels.int4_linear.fragments import (
    TILE_M,
    TILE_N,
    UNIT,
    FragmentWeight,
    fragment_order,
    why_no_fragments,
)
from tilewright.kernels.int4_linear.triton_mma import (
    WHOLE_ROW,
    load_step,
    load_x,
    multiply_word,
    offset_pair,
    scale_of,
)
from tilewright.kernels.matrices import FLOAT_DTYPES, rows_of
from tilewright.kernels.triton.common import TRITON_DTYPES, finish_tile, why_not_on_gpu
from tilewright.kernels.triton.linear import run_linear
from tilewright.kernels.triton.registers import check_registers, split_registers, words_of
from tilewright.kernels.triton.split_k import choose_split, plan_cut_product
from tilewright.kernels.tuning import tunable

_TILE_N = tl.constexpr(TILE_N)
_TILE_M = tl.constexpr(TILE_M)
LARGEST_M = TILE_M
#: Warps that a multiprocessor should have, eight for each of its schedulers.
WARPS = 32
MOST_WARPS_PER_TILE = 4
#: Steps that a warp should have at least.
FEWEST_STEPS = 4


@dataclass(frozen=True)
class FragmentConfig:
    """warps_per_tile: warps that share 16 features and take the steps of K in turn, a divisor of num_warps. distance:
    steps that words are loaded ahead, 1 or 2. splits: parts of K that are programs of their own, at most.
    """

    num_warps: int
    warps_per_tile: int = 1
    distance: int = 2
    splits: int = 1

    @property
    def block_m(self) -> int:
        """Rows of x of a program."""
        return TILE_M

    @property
    def block_n(self) -> int:
        """Output features of a program."""
        return TILE_N * self.num_warps // self.warps_per_tile

    @property
    def num_stages(self) -> int:
        """Loads are ordered in the source."""
        return 1

    @classmethod
    def for_problem(cls, problem: Problem) -> FragmentConfig:
        """As many warps as keep the memory busy, by N, K and the GPU alone; a second launch only for rows so long that
        it does not show. Of the configs that an H200 ran these were the fastest at 4096 x 4096, 8192 x 8192 and
        28672 x 4096.
        """
        multiprocessors, tiles = problem.multiprocessors or 132, triton.cdiv(problem.n, TILE_N)
        steps = step_count(problem.k, problem.group_size or problem.k)
        required = min(WARPS * multiprocessors // max(tiles, 1), steps // FEWEST_STEPS, MOST_WARPS_PER_TILE)
        warps_per_tile = 1
        while warps_per_tile * 2 <= required:
            warps_per_tile *= 2
        config = cls(max(warps_per_tile, 2), warps_per_tile)
        programs = triton.cdiv(problem.n, config.block_n)
        return replace(config, splits=choose_split(multiprocessors, programs, steps // (FEWEST_STEPS * warps_per_tile)))


#: Every kernel that the heuristic can choose, with K whole and cut, and some that it does not.
CONFIGS = [
    FragmentConfig(2, 1),
    FragmentConfig(2, 2),
    FragmentConfig(4, 4),
    FragmentConfig(4, 4, splits=2),
    FragmentConfig(8, 8, distance=1),
    FragmentConfig(4, 1, distance=1, splits=4),
]


def step_units(k: int, group_size: int) -> int:
    """Units of a step: 2, or 1 where a step of two would not lie inside one group or K."""
    return 1 if k // UNIT % 2 or (group_size < k and group_size // UNIT % 2) else 2


def step_count(k: int, group_size: int) -> int:
    """Steps of a row of ``k`` columns."""
    return k // (UNIT * step_units(k, group_size))


def _candidates(problem: Problem) -> Iterator[FragmentConfig]:
    """Worth timing: few or many warps to a tile."""
    for num_warps, distance, splits in itertools.product((2, 4, 8), (1, 2), (1, 2, 4, 8)):
        for warps_per_tile in (1, 2, 4, 8):
            if num_warps % warps_per_tile == 0:
                yield FragmentConfig(num_warps, warps_per_tile, distance, splits)


def why_not_config(config: FragmentConfig, problem: Problem) -> str | None:
    """The reason why a launch with ``config`` does ``problem`` wastefully for sure, or None."""
    parts = config.splits * config.warps_per_tile
    if parts > 1 and parts * FEWEST_STEPS > step_count(problem.k, problem.group_size or problem.k):
        return f"warps of less than {FEWEST_STEPS} steps"
    return None


TUNED = tunable(
    __name__,
    FragmentConfig.for_problem,
    _candidates,
    why_not_config,
    shares=(
        "tilewright.kernels.int4_linear.fragments",
        "tilewright.kernels.int4_linear.triton_mma",
        "tilewright.kernels.triton.registers",
    ),
)


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None."""
    if reason := why_not_on_gpu(problem):
        return reason
    if problem.capability is None:
        return "mma.sync is an instruction of NVIDIA's GPUs"
    if problem.capability[0] >= 10:
        return "its mma.sync was emulated for compute capability 8.0 and 9.0 only"
    if problem.m > LARGEST_M:
        return f"for batches up to {LARGEST_M}, this one has {problem.m} rows"
    if problem.x_dtype not in FLOAT_DTYPES or problem.multiply_dtype not in (torch.float16, torch.bfloat16):
        return f"multiplies in float16 and bfloat16, not {problem.x_dtype} in {problem.multiply_dtype}"
    if problem.scale_dtype not in (torch.float16, torch.bfloat16):
        return f"takes scales of 16 bits, not {problem.scale_dtype}"
    return why_no_fragments(problem.k, problem.group_size or problem.k)


@triton.jit(do_not_specialize=["M", "steps", "steps_per_part", "groups", "row_tiles"])
def int4_fragment_kernel(
    x_ptr,
    words_ptr,
    groups_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    workspace_ptr,
    M,
    N,
    stride_x,
    stride_residual_m,
    stride_residual_n,
    steps,
    steps_per_part,
    groups,
    row_tiles,
    tiles_m,
    DTYPE: tl.constexpr,
    SCALE: tl.constexpr,
    UNITS: tl.constexpr,
    STEPS_PER_GROUP: tl.constexpr,
    THREADS: tl.constexpr,
    WARPS_PER_TILE: tl.constexpr,
    DISTANCE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """16 features for WARPS_PER_TILE warps and 8 rows of x. x_ptr: int32; stride_x in words.

    groups: of a row. row_tiles: tiles of 16 features of the weight. THREADS: exactly as many as the launch has.
    """
    TILES: tl.constexpr = THREADS // 32 // WARPS_PER_TILE
    thread = tl.arange(0, THREADS)
    lane, warp = thread % 32, thread // 32
    part = tl.program_id(1)
    first_tile = tl.program_id(0) // tiles_m * TILES
    first_row = tl.program_id(0) % tiles_m * _TILE_M
    # A warp past the end repeats the last tile: all threads must take part in the instruction.
    tile = tl.minimum(first_tile + warp // WARPS_PER_TILE, row_tiles - 1).to(tl.int64)
    word = words_ptr + (tile * steps * (UNITS * 128) + lane * 4)[:, None] + tl.arange(0, 4)[None, :]
    group = groups_ptr + (tile * groups * _TILE_N + lane // 4 * 2)[:, None] + tl.arange(0, 2)[None, :]
    x_row = x_ptr + tl.minimum(first_row + lane // 4, M - 1).to(tl.int64) * stride_x + lane % 4 * 8
    first = part * steps_per_part
    last = tl.minimum(first + steps_per_part, steps)
    step = first + warp % WARPS_PER_TILE
    none = tl.zeros((THREADS,), tl.float32)
    s0, s1, s2, s3 = none, none, none, none
    w0, w1, scales = load_step(word, group, tl.minimum(step, last - 1), UNITS, STEPS_PER_GROUP)
    if DISTANCE == 2:
        following = tl.minimum(step + WARPS_PER_TILE, last - 1)
        v0, v1, v_scales = load_step(word, group, following, UNITS, STEPS_PER_GROUP)
    for _ in range(tl.cdiv(last - first, WARPS_PER_TILE)):
        following = tl.minimum(step + DISTANCE * WARPS_PER_TILE, last - 1)
        f0, f1, f_scales = load_step(word, group, following, UNITS, STEPS_PER_GROUP)
        upper, lower = tl.split(scales)
        upper_offset, lower_offset = offset_pair(upper), offset_pair(lower)
        p0, p1, p2, p3 = none, none, none, none
        for i in tl.static_range(UNITS):
            unit = tl.minimum(step, last - 1) * UNITS + i
            r0, r1, r2, r3 = split_registers(w0 if i == 0 else w1)
            b0, b1, b2, b3, b4, b5, b6, b7 = load_x(x_row, unit)
            for j in tl.static_range(4):
                r = r0 if j == 0 else (r1 if j == 1 else (r2 if j == 2 else r3))
                b = b0 if j == 0 else (b2 if j == 1 else (b4 if j == 2 else b6))
                d = b1 if j == 0 else (b3 if j == 1 else (b5 if j == 2 else b7))
                p0, p1, p2, p3 = multiply_word(r, upper_offset, lower_offset, b, d, p0, p1, p2, p3, DTYPE)
        upper_scale, lower_scale = scale_of(upper, SCALE), scale_of(lower, SCALE)
        if WARPS_PER_TILE > 1:
            # A warp without a step of its own has repeated the last one.
            upper_scale, lower_scale = (
                tl.where(step < last, upper_scale, 0.0),
                tl.where(step < last, lower_scale, 0.0),
            )
        s0, s1 = tl.fma(p0, upper_scale, s0), tl.fma(p1, upper_scale, s1)
        s2, s3 = tl.fma(p2, lower_scale, s2), tl.fma(p3, lower_scale, s3)
        if DISTANCE == 2:
            w0, w1, scales = v0, v1, v_scales
            v0, v1, v_scales = f0, f1, f_scales
        else:
            w0, w1, scales = f0, f1, f_scales
        step += WARPS_PER_TILE
    THREADS_OF_TILES: tl.constexpr = THREADS // WARPS_PER_TILE
    total = tl.join(tl.join(s0, s2), tl.join(s1, s3))
    if WARPS_PER_TILE > 1:
        total = tl.sum(tl.reshape(total, (TILES, WARPS_PER_TILE, 128)), axis=1)
    total = tl.reshape(total, (THREADS_OF_TILES, 4))
    # Lane 4 g + t has the sums of rows 2 t, 2 t + 1 of x and of features g, g + 8.
    owner, i = tl.arange(0, THREADS_OF_TILES)[:, None], tl.arange(0, 4)[None, :]
    row = first_row + 2 * (owner % 4) + i % 2
    column = (first_tile + owner // 32) * _TILE_N + owner % 32 // 4 + i // 2 * 8
    if workspace_ptr is not None:
        place = (part.to(tl.int64) * M + row) * N + column
        tl.store(workspace_ptr + place, total, mask=(row < M) & (column < N))
    else:
        finish_tile(
            total, out_ptr, bias_ptr, residual_ptr, row, column, M, N, stride_residual_m, stride_residual_n, ACTIVATION
        )


def plan_fragments(
    x: torch.Tensor,
    weight: FragmentWeight,
    out: torch.Tensor,
    *,
    config: FragmentConfig,
    inline_ptx: bool = True,
    **end: Unpack[End],
) -> list[Launch]:
    """The launches that fill ``out`` [M, N]: the product, and the sum over parts where K is cut into such.

    x [M, K], rounded to the weight's dtype; bias [N] contiguous; residual [M, N]. Raises ValueError for a weight that
    is not 16-byte aligned, and where there is no inline PTX: there is no other way to issue the instruction.
    """
    check_registers("mma.sync", inline_ptx, words=weight.words, groups=weight.groups)
    x = words_of(x.to(weight.dtype))
    units = step_units(weight.k, weight.group_size or weight.k)
    args = {
        "words_ptr": weight.words,
        "groups_ptr": weight.groups,
        "stride_x": x.stride(0),
        "groups": weight.groups.shape[1],
        "row_tiles": len(weight.words),
    }
    constants = {
        "DTYPE": TRITON_DTYPES[weight.dtype],
        "SCALE": TRITON_DTYPES[weight.scale_dtype],
        "UNITS": units,
        "STEPS_PER_GROUP": WHOLE_ROW.value if weight.group_size is None else weight.group_size // (UNIT * units),
        "THREADS": 32 * config.num_warps,
        "WARPS_PER_TILE": config.warps_per_tile,
        "DISTANCE": config.distance,
    }
    steps = {"steps": weight.units // units}
    return plan_cut_product(int4_fragment_kernel, x, out, config, steps, torch.float32, args, constants, **end)


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
    """See the reference. Raises ValueError for a weight that has no fragment order, see ``fragments``."""
    n, k = len(weight_packed), x.shape[-1]

    def launches(out: torch.Tensor, **end: Unpack[End]) -> list[Launch]:
        rows = rows_of(x)
        facts: dict[str, Any] = {"group_size": group_size, "symmetric": weight_zero is None}
        facts |= {"compute_dtype": compute_dtype, "scale_dtype": weight_scale.dtype, "aligned": rows_aligned(rows)}
        problem = Problem("int4_linear", len(rows), n, k, x.dtype, **facts, **device_facts(x.device))
        order = fragment_order(weight_packed, weight_scale, weight_zero, group_size, k, problem.multiply_dtype)
        return plan_fragments(rows, order, out, config=TUNED.choose(problem), **end)

    return run_linear(x, n, x.dtype, launches, **end)
