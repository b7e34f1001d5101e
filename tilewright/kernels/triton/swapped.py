"""The launches of a product whose operands are swapped, w_tile @ x_tile^T, and whose K may be split.

The features fill the 64 rows which a warp group's matrix instruction wants, so that the batch need only fill its
columns, 16 at the least.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.epilogue import End
from tilewright.kernels.triton.common import finish_arguments
from tilewright.kernels.triton.split_k import with_parts


def plan_swapped_product(
    kernel: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: dict[str, torch.Tensor],
    out: torch.Tensor,
    config: Any,
    block_k: int,
    sum_dtype: torch.dtype,
    constants: dict[str, Any],
    **end: Unpack[End],
) -> list[Launch]:
    """The one or two launches that write ``out`` [M, N]; x [M, K] and weight [N, K] with contiguous rows.

    scales: the kernel's ``w_scale_ptr`` [N] and, if it has one, ``x_scale_ptr`` [M]. config: has block_m, block_n,
    split_k, num_warps and num_stages. sum_dtype: of the parts of a split K. constants: further ones of the kernel.
    """
    (m, k), n, parts = x.shape, len(weight), config.split_k
    sums = None if parts == 1 else torch.empty((parts, m, n), dtype=sum_dtype, device=x.device)
    args = {
        **scales,
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
        **constants,
        "ACTIVATION": end["activation"],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": block_k,
        "SPLIT_K": parts,
        "EVEN_K": k % block_k == 0,
    }
    tiles = (triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m), parts)
    product = Launch(kernel, tiles, args, constants, config.num_warps, config.num_stages)
    x_scale, w_scale = scales.get("x_scale_ptr"), scales["w_scale_ptr"]
    return with_parts(product, sums, out, x_scale, w_scale, **end)
