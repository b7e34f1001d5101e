"""Linear layers on 2:4 weights in one pass over values and places, unpacked in registers: for small batches.

    y[m, n] = activation(sum_k x[m, k] * w[n, k] + b[n]) + r[m, n]

x [M, K] fp16 or bf16 with unit stride along K (int8 with a scale for each row where values are int8); the weight in
the order of ``layout.py``; b [N]; r [M, N] of any strides; y [M, N].

Bound by bytes: 1.125 for each bf16 weight, 0.625 for int8, 0.39 for int4, against the 2 of dense bf16. Tensor cores
then multiply densely, so from some batch on this cannot win (``gate``). A tile is held transposed, as in
``int4_linear``: unpacked weights go from registers into the product. Each group of four columns is taken apart, w_c
holding column 4 i + c of every group i of a block, and so is x:

    T[n, m] = sum over blocks and c of w_c[n, i] * x[m, 4 i + c]

int4 values are (u - z), exact in 16 bits, and the scale of a group multiplies the sum over its blocks.
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
from tilewright.kernels.sparse24_linear import gate, layout
from tilewright.kernels.sparse24_linear.layout import BLOCK, GROUPS, INT8, StepWeight
from tilewright.kernels.sparse24_linear.triton_run import operators, run, why_not_product
from tilewright.kernels.sparse24_linear.triton_select import select_columns
from tilewright.kernels.triton.common import TRITON_DTYPES, finish_tile, inline_ptx_by_default
from tilewright.kernels.triton.nibbles import nibble_number, offset_of
from tilewright.kernels.triton.split_k import choose_split, plan_cut_product, store_part

KINDS = {"sparse24_linear": layout.FLOAT, "sparse24_int8_linear": layout.INT8, "sparse24_int4_linear": layout.INT4}
_BLOCK = tl.constexpr(BLOCK)
_GROUPS = tl.constexpr(GROUPS)
_INT8 = tl.constexpr(INT8)
_INT4 = tl.constexpr(layout.INT4)
WHOLE_ROW = tl.constexpr(0)


@dataclass(frozen=True)
class UnpackConfig:
    """block_n, block_m: output features and rows of x of a tile. splits: parts that K is cut into, at most."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int
    splits: int = 1

    @classmethod
    def for_problem(cls, problem: Problem) -> UnpackConfig:
        """Batch tile by M; parts of K by N, K and the GPU alone, so that a row's result depends on no other."""
        tiles = [tile for tile in TILES if tile.suits(problem)]
        config = next((tile for tile in tiles if problem.m <= tile.block_m), tiles[-1])
        steps = layout.step_count(KINDS[problem.op], problem.k)
        programs = 2 * (problem.multiprocessors or 132)
        # A step is as long as four of other kernels.
        splits = choose_split(programs, triton.cdiv(problem.n, config.block_n), 4 * steps)
        config = replace(config, splits=min(splits, max(steps, 1)))
        if problem.gpu_arch is None:
            return config
        # Warps are 64 wide there: fewer of them leave each thread 16 bytes of int8.
        return replace(config, num_stages=1, num_warps=2 if problem.op == "sparse24_int8_linear" else 4)

    def suits(self, problem: Problem) -> bool:
        """Whether ``for_problem`` may choose this tile: those that spill registers on a chip are left out there."""
        capability = problem.capability or (9, 0)
        if capability < (9, 0) and problem.op == "sparse24_int4_linear":
            return self.block_m == 16 and self.num_warps == 8
        wide = capability >= (10, 0) and problem.op == "sparse24_linear"
        return self.num_warps == (8 if wide else 4)


#: Two stages of 64 features let two programs share a multiprocessor: one loads while the other multiplies. A batch tile
#: of 64 spills registers on sm_80 and sm_89.
TILES = (
    UnpackConfig(block_n=64, block_m=16, num_warps=4, num_stages=2),
    UnpackConfig(block_n=64, block_m=32, num_warps=4, num_stages=2),
    UnpackConfig(block_n=64, block_m=16, num_warps=8, num_stages=2),
    UnpackConfig(block_n=64, block_m=32, num_warps=8, num_stages=2),
)
CONFIGS = [replace(tile, splits=splits) for tile in TILES for splits in (1, 2)]


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None: it cannot, or it does not pay."""
    return why_cannot(problem) or gate.why_not_unpacked(problem)


def why_cannot(problem: Problem) -> str | None:
    """The reason why the kernel cannot compute ``problem``, or None."""
    if reason := why_not_product(problem):
        return reason
    if problem.op == "sparse24_int4_linear":
        return layout.why_no_blocks(problem.k, problem.group_size or problem.k)
    return None


@triton.jit
def _columns_of_x(x_rows, start, K, DTYPE: tl.constexpr, EVEN_K: tl.constexpr):
    """Columns start + 4 i + c of a tile of x, i < 32, as four tiles [32, BM] for c = 0 to 3."""
    column = start + tl.arange(0, _BLOCK)[None, :]
    if EVEN_K:
        x = tl.load(x_rows + column)
    else:
        x = tl.load(x_rows + column, mask=column < K, other=0)
    even, odd = tl.split(tl.reshape(x.to(DTYPE), (x.shape[0], _GROUPS, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0.trans(), x1.trans(), x2.trans(), x3.trans()


@triton.jit(do_not_specialize=["M"])
def sparse24_unpack_kernel(
    x_ptr,
    values_ptr,
    mask_ptr,
    scale_ptr,
    zero_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    workspace_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_residual_m,
    stride_residual_n,
    steps,
    steps_per_part,
    tiles_m,
    KIND: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PER_GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INLINE_PTX: tl.constexpr,
):
    """One tile of out, or with a workspace one part of its sum. BLOCKS: of a step. DTYPE: what is multiplied."""
    SUM: tl.constexpr = tl.int32 if KIND == _INT8 else tl.float32
    # Elements of a row of values in a step: two tiles a block, or an int4 word for two blocks.
    PER_BLOCK: tl.constexpr = _GROUPS // 2 if KIND == _INT4 else 2 * _GROUPS
    part = tl.program_id(1)
    row = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part * steps_per_part
    last = tl.minimum(first + steps_per_part, steps)
    x_rows = x_ptr + tl.minimum(row, M - 1).to(tl.int64)[:, None] * stride_xm
    inner = tl.minimum(column, N - 1).to(tl.int64)
    word = tl.arange(0, _GROUPS)[None, :]
    values = values_ptr + inner[:, None] * steps * (BLOCKS * PER_BLOCK) + word
    masks = mask_ptr + inner[:, None] * steps * _GROUPS + word
    total = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    zero = tl.full((BLOCK_N,), 8, tl.uint8)
    if KIND == _INT4 and BLOCKS_PER_GROUP == WHOLE_ROW:
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + inner)
    for step in range(first, last):
        words = tl.load(masks + step * _GROUPS)
        here = values + step * (BLOCKS * PER_BLOCK)
        for block in tl.static_range(BLOCKS):
            if KIND == _INT4:
                if BLOCKS_PER_GROUP != WHOLE_ROW:
                    group = (step * BLOCKS + block) // BLOCKS_PER_GROUP * N + inner
                    if zero_ptr is not None:
                        zero = tl.load(zero_ptr + group)
                if block % 2 == 0:
                    packed = tl.load(here + block // 2 * _GROUPS)
                offset = tl.broadcast_to(offset_of(zero, DTYPE)[:, None], packed.shape)
                v0 = nibble_number(packed, 2 * (block % 2), offset, DTYPE, INLINE_PTX).to(tl.int16, bitcast=True)
                v1 = nibble_number(packed, 2 * (block % 2) + 1, offset, DTYPE, INLINE_PTX).to(tl.int16, bitcast=True)
            else:
                v0 = tl.load(here + block * PER_BLOCK)
                v1 = tl.load(here + block * PER_BLOCK + _GROUPS)
            w0, w1, w2, w3 = select_columns(v0, v1, words, block, DTYPE, INLINE_PTX)
            x0, x1, x2, x3 = _columns_of_x(x_rows, (step * BLOCKS + block) * _BLOCK, K, DTYPE, EVEN_K)
            if KIND == _INT4 and BLOCKS_PER_GROUP != WHOLE_ROW:
                sums = tl.zeros((BLOCK_N, BLOCK_M), SUM)
            else:
                sums = total
            sums = tl.dot(w0, x0, sums, out_dtype=SUM)
            sums = tl.dot(w1, x1, sums, out_dtype=SUM)
            sums = tl.dot(w2, x2, sums, out_dtype=SUM)
            sums = tl.dot(w3, x3, sums, out_dtype=SUM)
            if KIND == _INT4 and BLOCKS_PER_GROUP != WHOLE_ROW:
                total += sums * tl.load(scale_ptr + group).to(tl.float32)[:, None]
            else:
                total = sums
    if KIND == _INT4 and BLOCKS_PER_GROUP == WHOLE_ROW:
        total *= tl.load(scale_ptr + inner).to(tl.float32)[:, None]
    if workspace_ptr is not None:
        store_part(total, workspace_ptr, part, row, column, M, N)
    else:
        y = total.to(tl.float32)
        if KIND == _INT8:
            y *= tl.load(x_scale_ptr + row, mask=row < M, other=0.0)[None, :]
            y *= tl.load(w_scale_ptr + inner)[:, None]
        finish_tile(
            y,
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


def plan_unpack(
    x: torch.Tensor,
    weight: StepWeight,
    out: torch.Tensor,
    *,
    compute_dtype: torch.dtype,
    config: UnpackConfig,
    inline_ptx: bool | None = None,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    **end: Unpack[End],
) -> list[Launch]:
    """The launches that fill ``out`` [M, N]: the product, and the sum over parts where K is cut.

    x [M, K] with unit stride along K, int8 with x_scale [M] and w_scale [N] for int8 values; bias [N] contiguous.
    inline_ptx: None for what suits the device.
    """
    blocks = layout.blocks_per_step(weight.kind)
    args = {
        "values_ptr": weight.values if weight.kind == INT8 else weight.values.view(torch.int16),
        "mask_ptr": weight.mask,
        "scale_ptr": weight.scale,
        "zero_ptr": weight.zero,
        "x_scale_ptr": x_scale,
        "w_scale_ptr": w_scale,
        "K": weight.k,
        "stride_xm": x.stride(0),
    }
    constants = {
        "KIND": weight.kind,
        "BLOCKS": blocks,
        "BLOCKS_PER_GROUP": weight.blocks_per_group,
        "DTYPE": TRITON_DTYPES[compute_dtype],
        "EVEN_K": weight.k % (blocks * BLOCK) == 0,
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "INLINE_PTX": inline_ptx_by_default(x.device) if inline_ptx is None else inline_ptx,
    }
    steps, sum_dtype = {"steps": weight.steps}, torch.int32 if weight.kind == INT8 else torch.float32
    return plan_cut_product(sparse24_unpack_kernel, x, out, config, steps, sum_dtype, args, constants, **end)


sparse24_linear, sparse24_int8_linear = operators(plan_unpack, UnpackConfig.for_problem, layout.step_order)


def sparse24_int4_linear(
    x: torch.Tensor,
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None = None,
    *,
    group_size: int,
    compute_dtype: torch.dtype | None = None,
    **end: Unpack[End],
) -> torch.Tensor:
    """See ``reference.sparse24_int4_linear``. Raises ValueError for groups that have no kernel order."""
    k = x.shape[-1]
    weight = layout.int4_order(weight_values, weight_meta, weight_scale, weight_zero, group_size, k)
    narrow = compute_dtype or x.dtype
    configure = UnpackConfig.for_problem
    return run("sparse24_int4_linear", plan_unpack, configure, x, weight, x.dtype, narrow, **end)
