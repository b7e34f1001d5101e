"""Linear layer on int4 weights as "dequantise, then the library's product", on any device PyTorch knows.

The weight is dequantised some rows at a time, so that no more than ``SCRATCH_BYTES`` of it exist at once (or ``ROWS``
rows). Beyond some batch this is also the fastest way on a GPU: the weight is widened once instead of once for each tile
of the batch, and the product runs at the library's speed. There a kernel feeds it, see ``triton_dequantize.py``.
"""

from __future__ import annotations

import torch

from tilewright.kernels.epilogue import finish
from tilewright.kernels.formats import int4
from tilewright.kernels.matrices import as_matrix, row_blocks, wide_product


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
    """See the reference, which this equals but for the order of sums."""
    n, k = len(weight_packed), x.shape[-1]
    narrow = compute_dtype or x.dtype
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    rows = as_matrix(x).to(narrow)
    residual = None if residual is None else residual.expand(out.shape)
    for first, last in row_blocks(n, k, narrow):
        zero = None if weight_zero is None else weight_zero[first // 8 : -(-last // 8)]
        weight = int4.dequantize(weight_packed[first:last], weight_scale[first:last], zero, group_size, k, narrow)
        block = wide_product(rows, weight).reshape(*x.shape[:-1], last - first)
        block_bias = None if bias is None else bias[first:last]
        block_residual = None if residual is None else residual[..., first:last]
        out[..., first:last] = finish(block, block_bias, block_residual, activation, x.dtype)
    return out
