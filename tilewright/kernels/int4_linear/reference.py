"""Linear layer on int4 weights and float activations, W4A16 (the definition).

    y[m, n] = activation(sum_k x[m, k] * (u[n, k] - z[n, g]) * s[n, g] + b[n]) + r[m, n],    g = k // group_size

x and the dequantised weight are rounded to ``compute_dtype`` (default: the dtype of x), sums are float32, and the
result is cast once, to the dtype of x. ``weight_packed``, ``weight_scale`` and ``weight_zero`` are those of
``formats.int4``.
"""

from __future__ import annotations

import torch

from tilewright.kernels.epilogue import finish
from tilewright.kernels.formats import int4


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
    """x float [..., K], weight_packed int32 [N, ceil(K / 8)], weight_scale [N, G], weight_zero int32 [ceil(N / 8),
    G].
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    narrow = compute_dtype or x.dtype
    weight = int4.dequantize(weight_packed, weight_scale, weight_zero, group_size, x.shape[-1], dtype=wide)
    y = x.to(narrow).to(wide) @ weight.to(narrow).to(wide).t()
    return finish(y, bias, residual, activation, x.dtype)
