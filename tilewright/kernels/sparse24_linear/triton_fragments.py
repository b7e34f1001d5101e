"""Linear layers on 2:4 weights with the sparse matrix instruction ``mma.sp``, issued through inline assembly.

    y[m, n] = activation(sum_k x[m, k] * w[n, k] + b[n]) + r[m, n]

x [M, K] fp16 or bf16 (int8 with a scale for each row where values are int8), K a multiple of 128; the weight in the
order of ``fragments.py``; b [N]; r [M, N] of any strides; y [M, N].

A warp holds 16 output features and 8 or 16 rows of x in the registers of its threads, and every thread loads its own
registers: weights in 16 bytes at a time, as they lie; x as pairs of columns from its rows, which all warps share in the
L1 cache (int8: 16 bytes). No shared memory, no conversion. Weights of the next unit are on their way while one is
multiplied.

A weight that is not kept is not multiplied, so NaN and Inf of x would reach only some outputs of their row. Two columns
of x at a time are therefore multiplied by 0 and added up as well: anything but 0 turns the row into NaN. (int8: the
scale of such a row is not finite.)

The compiler does not know that the instruction works across a warp. It gives thread i element i of a vector of as many
elements as there are threads, which is what the instruction needs, as long as weights are loaded in 16 bytes: so their
address must be a multiple of 16, which the launcher checks, and the vectors have 32 elements for each warp, no more and
no fewer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import End
from tilewright.kernels.sparse24_linear import gate
from tilewright.kernels.sparse24_linear.fragments import (
    TILE_M,
    TILE_N,
    UNIT,
    FragmentWeight,
    fragment_order,
    unit_count,
)
from tilewright.kernels.sparse24_linear.triton_mma_sp import load_unit, multiply_step, poison, watch, x_registers
from tilewright.kernels.sparse24_linear.triton_run import operators, why_not_product
from tilewright.kernels.triton.common import TRITON_DTYPES, finish_tile
from tilewright.kernels.triton.registers import check_registers, split_registers, words_of
from tilewright.kernels.triton.split_k import choose_split, plan_cut_product

_TILE_N = tl.constexpr(TILE_N)
_TILE_M = tl.constexpr(TILE_M)


@dataclass(frozen=True)
class FragmentConfig:
    """block_m: rows of x of a program, 8 or 16. splits: parts that K is cut into, at most."""

    block_m: int
    num_warps: int
    splits: int = 1

    @property
    def block_n(self) -> int:
        """Output features of a program: a tile for each warp."""
        return TILE_N * self.num_warps

    @property
    def num_stages(self) -> int:
        """Loads are ordered in the source."""
        return 1

    @classmethod
    def for_problem(cls, problem: Problem) -> FragmentConfig:
        """As many programs as keep the memory busy, by N, K and the GPU alone: eight small ones share a
        multiprocessor.
        """
        config = TILES[0] if problem.m <= TILES[0].block_m else TILES[1]
        tiles = triton.cdiv(problem.n, config.block_n)
        return replace(config, splits=choose_split(8 * (problem.multiprocessors or 132), tiles, unit_count(problem.k)))


TILES = (FragmentConfig(block_m=8, num_warps=4), FragmentConfig(block_m=16, num_warps=4))
CONFIGS = [replace(tile, splits=splits) for tile in TILES for splits in (1, 2)]


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None: it cannot, or it does not pay."""
    return why_cannot(problem) or gate.why_not_fragments(problem)


def why_cannot(problem: Problem) -> str | None:
    """The reason why the kernel cannot compute ``problem``, or None."""
    if reason := why_not_product(problem):
        return reason
    if problem.capability is None:
        return "mma.sp is an instruction of NVIDIA's GPUs"
    if problem.capability[0] >= 10:
        return "mma.sp was emulated for compute capability 8.0 and 9.0 only"
    if problem.op not in ("sparse24_linear", "sparse24_int8_linear"):
        return "multiplies int8 and 16-bit floats, which int4 values are not until they are unpacked"
    if problem.k % UNIT or not problem.k:
        return f"takes rows of a multiple of {UNIT} columns, not of {problem.k}"
    return None


@triton.jit(do_not_specialize=["M"])
def sparse24_fragment_kernel(
    x_ptr,
    values_ptr,
    meta_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    workspace_ptr,
    M,
    N,
    stride_x,
    stride_residual_m,
    stride_residual_n,
    units,
    units_per_part,
    row_tiles,
    tiles_m,
    DTYPE: tl.constexpr,
    THREADS: tl.constexpr,
    TWO: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """16 features for each warp, 8 rows of x or (TWO) 16. x_ptr, values_ptr, meta_ptr: int32; stride_x in words.

    row_tiles: tiles of 16 features of the weight. THREADS: exactly as many as the launch has.
    """
    IS_INT8: tl.constexpr = tl.int8 == DTYPE
    SUM: tl.constexpr = tl.int32 if IS_INT8 else tl.float32
    STEPS: tl.constexpr = 2 if IS_INT8 else 4
    thread = tl.arange(0, THREADS)
    lane = thread % 32
    part = tl.program_id(1)
    tile = tl.program_id(0) // tiles_m * (THREADS // 32) + thread // 32
    first_row = tl.program_id(0) % tiles_m * (_TILE_M * (2 if TWO else 1))
    first = part * units_per_part
    last = tl.minimum(first + units_per_part, units)
    # A warp past the end repeats the last tile: all threads must take part in the instruction.
    inner = tl.minimum(tile, row_tiles - 1).to(tl.int64)
    values = values_ptr + (inner * units * (STEPS * 128) + lane * 4)[:, None] + tl.arange(0, 4)[None, :]
    meta = meta_ptr + inner * units * 64 + lane
    x_row = x_ptr + tl.minimum(first_row + lane // 4, M - 1).to(tl.int64) * stride_x
    other_row = x_ptr + tl.minimum(first_row + _TILE_M + lane // 4, M - 1).to(tl.int64) * stride_x
    lane4 = lane % 4
    s0 = tl.zeros((THREADS,), SUM)
    s1 = tl.zeros((THREADS,), SUM)
    s2 = tl.zeros((THREADS,), SUM)
    s3 = tl.zeros((THREADS,), SUM)
    t0, t1, t2, t3 = s0, s1, s2, s3
    zeros = tl.zeros((THREADS,), tl.int32)
    other_zeros = zeros
    m0, m1, r0, r1, r2, r3 = load_unit(values, meta, first, STEPS)
    for unit in range(first, last):
        following = tl.minimum(unit + 1, last - 1)
        next_m0, next_m1, next_r0, next_r1, next_r2, next_r3 = load_unit(values, meta, following, STEPS)
        for step in tl.static_range(STEPS):
            registers = r0 if step == 0 else (r1 if step == 1 else (r2 if step == 2 else r3))
            places = m0 if step * 2 < STEPS else m1
            a0, a1, a2, a3 = split_registers(registers)
            b0, b1, b2, b3 = x_registers(x_row, unit, lane4, step, IS_INT8)
            s0, s1, s2, s3 = multiply_step(a0, a1, a2, a3, b0, b1, b2, b3, places, s0, s1, s2, s3, step, DTYPE)
            if not IS_INT8:
                zeros = watch(b3, watch(b2, watch(b1, watch(b0, zeros, DTYPE), DTYPE), DTYPE), DTYPE)
            if TWO:
                c0, c1, c2, c3 = x_registers(other_row, unit, lane4, step, IS_INT8)
                t0, t1, t2, t3 = multiply_step(a0, a1, a2, a3, c0, c1, c2, c3, places, t0, t1, t2, t3, step, DTYPE)
                if not IS_INT8:
                    other_zeros = watch(c1, watch(c0, other_zeros, DTYPE), DTYPE)
                    other_zeros = watch(c3, watch(c2, other_zeros, DTYPE), DTYPE)
        m0, m1, r0, r1, r2, r3 = next_m0, next_m1, next_r0, next_r1, next_r2, next_r3
    if not IS_INT8:
        even, odd = poison(zeros, THREADS)
        s0, s1, s2, s3 = s0 + even, s1 + odd, s2 + even, s3 + odd
        if TWO:
            even, odd = poison(other_zeros, THREADS)
            t0, t1, t2, t3 = t0 + even, t1 + odd, t2 + even, t3 + odd
    first_row += 2 * lane4
    column = tile * _TILE_N + lane // 4
    # The instruction leaves a thread the sums of two neighbouring rows, of features that are 8 apart.
    for half in tl.static_range(2 if TWO else 1):
        row = first_row + half * _TILE_M
        for i in tl.static_range(4):
            if half == 0:
                total = s0 if i == 0 else (s1 if i == 1 else (s2 if i == 2 else s3))
            else:
                total = t0 if i == 0 else (t1 if i == 1 else (t2 if i == 2 else t3))
            m = row + i % 2
            n = column + 8 * (i // 2)
            inside = (m < M) & (n < N)
            if workspace_ptr is not None:
                tl.store(workspace_ptr + (part.to(tl.int64) * M + m) * N + n, total, mask=inside)
            else:
                y = total.to(tl.float32)
                if IS_INT8:
                    y *= tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
                    y *= tl.load(w_scale_ptr + n, mask=n < N, other=0.0)
                finish_tile(
                    y, out_ptr, bias_ptr, residual_ptr, m, n, M, N, stride_residual_m, stride_residual_n, ACTIVATION
                )


def plan_fragments(
    x: torch.Tensor,
    weight: FragmentWeight,
    out: torch.Tensor,
    *,
    compute_dtype: torch.dtype,
    config: FragmentConfig,
    inline_ptx: bool = True,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    **end: Unpack[End],
) -> list[Launch]:
    """The launches that fill ``out`` [M, N]: the product, and the sum over parts where K is cut.

    x [M, K] in compute_dtype, or int8 with x_scale [M] and w_scale [N]; bias [N] contiguous. Raises ValueError for a
    weight that is not 16-byte aligned, and where there is no inline PTX: there is no other way to issue ``mma.sp``.
    """
    check_registers("mma.sp", inline_ptx, values=weight.values, meta=weight.meta)
    x = words_of(x.to(compute_dtype))
    args = {
        "values_ptr": weight.values,
        "meta_ptr": weight.meta,
        "x_scale_ptr": x_scale,
        "w_scale_ptr": w_scale,
        "stride_x": x.stride(0),
        "row_tiles": len(weight.values),
    }
    constants = {
        "DTYPE": TRITON_DTYPES[compute_dtype],
        "THREADS": 32 * config.num_warps,
        "TWO": config.block_m == 2 * TILE_M,
    }
    units, sum_dtype = {"units": weight.units}, torch.int32 if weight.is_int8 else torch.float32
    return plan_cut_product(sparse24_fragment_kernel, x, out, config, units, sum_dtype, args, constants, **end)


#: K must be a multiple of 128.
sparse24_linear, sparse24_int8_linear = operators(plan_fragments, FragmentConfig.for_problem, fragment_order)
