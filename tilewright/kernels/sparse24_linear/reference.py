"""Linear layers on 2:4 weights (the definition): the weight unpacked, then the dense operator of the same values.

    sparse24_linear        y[m, n] = activation(sum_k x[m, k] * w[n, k] + b[n]) + r[m, n]
                           x and w are rounded to ``compute_dtype`` (default: the dtype of x), sums are float32;
                           who multiplies in a wider type may leave x as it is
    sparse24_int8_linear   as ``int8_linear``: activations are quantised per row, integer sums are exact
    sparse24_int4_linear   as ``int4_linear``: w = (u - z) * s where kept, 0 elsewhere

weight_values and weight_meta are those of ``formats.sparse24``.
"""

from __future__ import annotations

import torch

from tilewright.kernels.epilogue import finish
from tilewright.kernels.formats import sparse24
from tilewright.kernels.int4_linear import reference as int4_reference
from tilewright.kernels.int8_linear import reference as int8_reference


def sparse24_linear(
    x: torch.Tensor,
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x float [..., K], weight_values float [N, 2 G], weight_meta uint8 [N, ceil(G / 2)] -> x.dtype [..., N]."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    narrow = compute_dtype or x.dtype
    weight = sparse24.unpack(weight_values, weight_meta, x.shape[-1])
    y = x.to(narrow).to(wide) @ weight.to(narrow).to(wide).t()
    return finish(y, bias, residual, activation, x.dtype)


def sparse24_int8_linear(
    x: torch.Tensor,
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    channel_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x float [..., K], weight_values int8 [N, 2 G], weight_meta uint8 [N, ceil(G / 2)], weight_scale float32 [N] ->
    x.dtype [..., N].
    """
    weight = sparse24.unpack(weight_values, weight_meta, x.shape[-1])
    return int8_reference.int8_linear(x, weight, weight_scale, bias, residual, activation, channel_scale)


def sparse24_int4_linear(
    x: torch.Tensor,
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    group_size: int,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x float [..., K], weight_values int32 [N, ceil(2 G / 8)], weight_meta uint8 [N, ceil(G / 2)], weight_scale
    [N, ceil(K / group_size)] -> x.dtype [..., N].
    """
    packed = sparse24.unpack_int4(weight_values, weight_meta, weight_zero, group_size, x.shape[-1])
    dense = (x, packed, weight_scale, weight_zero, bias, residual)
    return int4_reference.int4_linear(*dense, group_size=group_size, activation=activation, compute_dtype=compute_dtype)
