"""Linear layer on int8 weights and int8 activations, W8A8 (the definition).

    y[m, n] = activation(s_x[m] * s_w[n] * sum_k q[m, k] * w[n, k] + b[n]) + r[m, n]

with (q, s_x) = quantize_per_row(x). The sum is exact (|q|, |w| <= 127, so int32 holds it up to K = 133,144); the rest
is float32 and is cast once, to the dtype of x.
"""

from __future__ import annotations

import torch

from tilewright.kernels.epilogue import finish
from tilewright.kernels.quantize.reference import quantize_per_row


def int8_linear_quantized(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x int8 [..., K], x_scale float32 [...], weight int8 [N, K], weight_scale float32 [N] -> out_dtype (or float32)
    [..., N].
    """
    # float64 holds every int32 sum exactly and, unlike an integer product, is fast everywhere.
    total = x.double() @ weight.double().t()
    y = total.float() * x_scale.unsqueeze(-1) * weight_scale.float()
    return finish(y, bias, residual, activation, out_dtype or torch.float32)


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    channel_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x float [..., K], weight int8 [N, K], weight_scale float32 [N], bias [N], residual [..., N] -> x.dtype [...,
    N].
    """
    q, scale = quantize_per_row(x, channel_scale)
    return int8_linear_quantized(q, scale, weight, weight_scale, bias, residual, activation, x.dtype)
