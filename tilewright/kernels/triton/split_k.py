"""Splitting the sum of a matrix product among programs, and adding the parts in a fixed order.

    y[m, n] = activation((sums[0, m, n] + sums[1, m, n] + ...) * s_x[m] * s_w[n] + b[n]) + r[m, n]

A small batch has too few tiles of y to keep every multiprocessor reading weights. Each part of K writes its sums, int32
or float32 [SPLIT_K, M, N]; the kernel here adds them in order of K and applies the epilogue. No atomics: a run repeats
bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from tilewright.aot.launch import Launch
from tilewright.kernels.triton.common import finish_tile

MAX_SPLIT = 8
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


def plan_reduce_parts(sums: torch.Tensor, epilogue: Mapping[str, Any], activation: str) -> Launch:
    """The launch that finishes ``sums`` [SPLIT_K, M, N]. epilogue: the kernel's arguments but ``sums_ptr``."""
    split_k, m, n = sums.shape
    block_n = WIDE_BLOCK_N if m > MANY_ROWS else BLOCK_N
    constants = {"ACTIVATION": activation, "SPLIT_K": split_k, "BLOCK_N": block_n}
    return Launch(reduce_parts_kernel, (triton.cdiv(n, block_n), m), {**epilogue, "sums_ptr": sums}, constants)
