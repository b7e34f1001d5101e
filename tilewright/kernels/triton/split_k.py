"""Splitting the sum of a matrix product among programs, and adding the parts in a fixed order.

    y[m, n] = activation((sums[0, m, n] + sums[1, m, n] + ...) * s_x[m] * s_w[n] + b[n]) + r[m, n]

A small batch has too few tiles of y to keep every multiprocessor reading weights. Each part of K writes its sums, int32
or float32 [SPLIT_K, M, N]; a kernel here adds them in order of K and applies the epilogue: ``reduce_parts_kernel``
where rows of the weight have a scale, ``sum_parts_kernel`` where the parts are scaled already. No atomics: a run
repeats bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.epilogue import End
from tilewright.kernels.triton.common import finish_arguments, finish_tile

MAX_SPLIT = 8
#: Columns of a program of ``sum_parts_kernel``.
REDUCE_BLOCK = 512
#: Columns of a program that adds parts: of few rows, and of so many that there are programs enough.
BLOCK_N, WIDE_BLOCK_N = 256, 1024
MANY_ROWS = 256


def choose_split(programs: int, tiles: int, steps: int) -> int:
    """Into how many parts to cut K (1, 2, 4 or 8) so that ``tiles`` tiles make about ``programs`` programs.

    steps: tiles along K. Each part keeps at least four: fewer would not fill the pipeline of loads.
    """
    most = min(programs // max(tiles, 1), steps // 4, MAX_SPLIT)
    split = 1
    while split * 2 <= most:
        split *= 2
    return split


@triton.jit(do_not_specialize=["M"])
def reduce_parts_kernel(
    sums_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    stride_residual_m,
    stride_residual_n,
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row and BLOCK_N columns of out [M, N]; x_scale may be None."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1)
    total = tl.zeros((BLOCK_N,), sums_ptr.dtype.element_ty)
    for part in tl.static_range(SPLIT_K):
        sums = sums_ptr + (part * M + row).to(tl.int64) * N + column
        total += tl.load(sums, mask=column < N, other=0)
    y = total.to(tl.float32)
    if x_scale_ptr is not None:
        y *= tl.load(x_scale_ptr + row)
    y *= tl.load(w_scale_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    finish_tile(y, out_ptr, bias_ptr, residual_ptr, row, column, M, N, stride_residual_m, stride_residual_n, ACTIVATION)


def plan_reduce_parts(
    sums: torch.Tensor, x_scale: torch.Tensor | None, w_scale: torch.Tensor, out: torch.Tensor, **end: Unpack[End]
) -> Launch:
    """The launch that finishes ``sums`` [SPLIT_K, M, N]; x_scale [M] or None, w_scale [N]."""
    split_k, m, n = sums.shape
    scales = {"x_scale_ptr": x_scale, "w_scale_ptr": w_scale}
    args = {"sums_ptr": sums, **scales, **finish_arguments(out, **end), "M": m, "N": n}
    block_n = WIDE_BLOCK_N if m > MANY_ROWS else BLOCK_N
    constants = {"ACTIVATION": end["activation"], "SPLIT_K": split_k, "BLOCK_N": block_n}
    return Launch(reduce_parts_kernel, (triton.cdiv(n, block_n), m), args, constants)


@triton.jit
def store_part(total, workspace_ptr, part, row, column, M, N):
    """T of one part of K into ``workspace`` float32 [parts, M, N]."""
    offset = (part.to(tl.int64) * M + row[None, :]) * N + column[:, None]
    tl.store(workspace_ptr + offset, total, mask=(row[None, :] < M) & (column[:, None] < N))


@triton.jit(do_not_specialize=["M"])
def sum_parts_kernel(
    workspace_ptr,
    x_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    width,
    first_column,
    parts,
    stride_residual_m,
    stride_residual_n,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[m, n] = activation(s_x[m] * sum_p workspace[p, m, n] + b[n]) + r[m, n], p in ascending order, s_x optional.

    workspace: float32 [parts, M, width], the columns from ``first_column`` on; width is N - first_column or a multiple
    of BLOCK.
    """
    row = tl.program_id(0)
    local = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = workspace_ptr + row.to(tl.int64) * width + local
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        total += tl.load(source, mask=local < width, other=0.0)
        source += M.to(tl.int64) * width
    if x_scale_ptr is not None:
        total *= tl.load(x_scale_ptr + row)
    finish_tile(
        total[None, :],
        out_ptr,
        bias_ptr,
        residual_ptr,
        tl.full((1, 1), 0, tl.int32) + row,
        (first_column + local)[None, :],
        M,
        N,
        stride_residual_m,
        stride_residual_n,
        ACTIVATION,
    )


def plan_sum_parts(
    workspace: torch.Tensor,
    x_scale: torch.Tensor | None,
    out: torch.Tensor,
    first_column: int = 0,
    **end: Unpack[End],
) -> Launch:
    """The launch that adds up ``workspace`` float32 [parts, M, width] and finishes as many columns of ``out`` [M, N].

    x_scale: float32 [M] or None. width: up to the last column of ``out``, or a multiple of ``REDUCE_BLOCK``.
    """
    parts, m, width = workspace.shape
    if first_column + width != out.shape[1] and width % REDUCE_BLOCK:
        raise ValueError(f"{width} columns in the middle of {out.shape[1]} are no multiple of {REDUCE_BLOCK}")
    args = {
        "workspace_ptr": workspace,
        "x_scale_ptr": x_scale,
        **finish_arguments(out, **end),
        "M": m,
        "N": out.shape[1],
        "width": width,
        "first_column": first_column,
        "parts": parts,
    }
    grid = (m, triton.cdiv(width, REDUCE_BLOCK))
    constants = {"ACTIVATION": end["activation"], "BLOCK": REDUCE_BLOCK}
    return Launch(sum_parts_kernel, grid, args, constants, num_warps=4)


def with_parts(
    product: Launch,
    workspace: torch.Tensor | None,
    out: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    **end: Unpack[End],
) -> list[Launch]:
    """``product``, and after it the sum over the parts that it leaves in ``workspace`` [parts, M, N], if there is one.

    x_scale: [M] or None. w_scale: [N] or None. The parts are float32, or int32 with both scales.
    """
    if workspace is None:
        return [product]
    if w_scale is None:
        return [product, plan_sum_parts(workspace, x_scale, out, **end)]
    return [product, plan_reduce_parts(workspace, x_scale, w_scale, out, **end)]


def plan_cut_product(
    kernel: Any,
    x: torch.Tensor,
    out: torch.Tensor,
    config: Any,
    steps: dict[str, int],
    sum_dtype: torch.dtype,
    args: dict[str, Any],
    constants: dict[str, Any],
    **end: Unpack[End],
) -> list[Launch]:
    """The launches that fill ``out`` [M, N] from ``x`` with M rows: ``kernel``, and the sum over parts where K is cut.

    config: has block_m, block_n, splits, num_warps and num_stages. steps: the kernel's name for steps of K, and how
    many there are. No part is empty, so there may be fewer than ``config.splits``. sum_dtype: of the parts. args: the
    kernel's further ones, maybe ``x_scale_ptr`` [M] and ``w_scale_ptr`` [N].
    """
    ((unit, count),) = steps.items()
    per_part = triton.cdiv(max(count, 1), config.splits)
    parts = triton.cdiv(max(count, 1), per_part)
    workspace = torch.empty((parts, *out.shape), dtype=sum_dtype, device=out.device) if parts > 1 else None
    tiles_m, tiles_n = triton.cdiv(len(x), config.block_m), triton.cdiv(out.shape[1], config.block_n)
    args = {
        "x_ptr": x,
        **args,
        "workspace_ptr": workspace,
        "M": len(x),
        "N": out.shape[1],
        unit: count,
        f"{unit}_per_part": per_part,
        "tiles_m": tiles_m,
        **finish_arguments(out, **end),
    }
    constants = {**constants, "ACTIVATION": end["activation"]}
    # Tiles that share weights are neighbours, so that the second one finds them in the L2 cache.
    product = Launch(kernel, (tiles_m * tiles_n, parts), args, constants, config.num_warps, config.num_stages)
    return with_parts(product, workspace, out, args.get("x_scale_ptr"), args.get("w_scale_ptr"), **end)
