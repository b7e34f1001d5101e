"""A product whose operands are swapped, w_tile @ x_tile^T, and whose K may be split: the kernel and its launches.

The features fill the 64 rows which a warp group's matrix instruction wants, so that the batch need only fill its
columns, 16 at the least.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.epilogue import End
from tilewright.kernels.triton.common import TRITON_DTYPES, finish_arguments, finish_tile
from tilewright.kernels.triton.split_k import with_parts


def swapped_product(
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
    part_k,
    stride_xm,
    stride_wn,
    stride_residual_m,
    stride_residual_n,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    """out: [M, N] in the dtype of the result, or sums [SPLIT_K, M, N] that ``reduce_parts_kernel`` finishes. COMPUTE:
    what is multiplied; int8 adds up to int32. BLOCK_SUMS: the products of a block are added up by themselves.
    """
    SUM: tl.constexpr = tl.int32 if tl.int8 == COMPUTE else tl.float32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    part = tl.program_id(2)
    first = part * part_k
    x_tile = x_ptr + m[:, None].to(tl.int64) * stride_xm + (first + k)[None, :]
    w_tile = w_ptr + n[:, None].to(tl.int64) * stride_wn + (first + k)[None, :]
    m_mask = m[:, None] < M
    n_mask = n[:, None] < N
    acc = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    for start in range(first, tl.minimum(first + part_k, K), BLOCK_K):
        if EVEN_K:
            w = tl.load(w_tile, mask=n_mask, other=0)
            x = tl.load(x_tile, mask=m_mask, other=0)
        else:
            k_mask = (start + k)[None, :] < K
            w = tl.load(w_tile, mask=n_mask & k_mask, other=0)
            x = tl.load(x_tile, mask=m_mask & k_mask, other=0)
        if BLOCK_SUMS:
            # Doubled, which is exact, because the compiler turns a bare sum of products back into a chain.
            acc += 2.0 * tl.dot(w.to(COMPUTE), tl.trans(x.to(COMPUTE)), input_precision="ieee")
        elif tl.int8 == COMPUTE:
            acc = tl.dot(w, tl.trans(x), acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(w.to(COMPUTE), tl.trans(x.to(COMPUTE)), acc, input_precision="ieee")
        w_tile += BLOCK_K
        x_tile += BLOCK_K
    if BLOCK_SUMS:
        acc *= 0.5
    row = m[None, :]
    column = n[:, None]
    if SPLIT_K == 1:
        if x_scale_ptr is not None:
            x_scale = tl.load(x_scale_ptr + row, mask=row < M, other=0.0)
        w_scale = tl.load(w_scale_ptr + column, mask=column < N, other=0.0).to(tl.float32)
        y = acc.to(tl.float32)
        if x_scale_ptr is not None:
            y *= x_scale
        y *= w_scale
        finish_tile(
            y, out_ptr, bias_ptr, residual_ptr, row, column, M, N, stride_residual_m, stride_residual_n, ACTIVATION
        )
    else:
        sums = out_ptr + (part * M + row).to(tl.int64) * N + column
        tl.store(sums, acc, mask=(row < M) & (column < N))


def plan_swapped_product(
    kernel: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor,
    out: torch.Tensor,
    compute_dtype: torch.dtype,
    config: Any,
    block_k: int,
    block_sums: bool = False,
    **end: Unpack[End],
) -> list[Launch]:
    """The one or two launches that write ``out`` [M, N]; x [M, K] and weight [N, K] with contiguous rows.

    kernel: of ``swapped_product``. x_scale [M], w_scale [N]. config: has block_m, block_n, split_k, num_warps and
    num_stages.
    """
    (m, k), n, parts = x.shape, len(weight), config.split_k
    sum_dtype = torch.int32 if compute_dtype == torch.int8 else torch.float32
    sums = None if parts == 1 else torch.empty((parts, m, n), dtype=sum_dtype, device=x.device)
    args = {
        "x_scale_ptr": x_scale,
        "w_scale_ptr": w_scale,
        **finish_arguments(out if sums is None else sums, **end),
        "x_ptr": x,
        "w_ptr": weight,
        "M": m,
        "N": n,
        "K": k,
        "part_k": triton.cdiv(k, parts * block_k) * block_k,
        "stride_xm": x.stride(0),
        "stride_wn": weight.stride(0),
    }
    constants = {
        "ACTIVATION": end["activation"],
        "COMPUTE": TRITON_DTYPES[compute_dtype],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": block_k,
        "SPLIT_K": parts,
        "EVEN_K": k % block_k == 0,
        "BLOCK_SUMS": block_sums,
    }
    tiles = (triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m), parts)
    product = Launch(kernel, tiles, args, constants, config.num_warps, config.num_stages)
    return with_parts(product, sums, out, x_scale, w_scale, **end)
