"""Linear layer on int8 weights and float activations, W8A16 (the definition).

    y[m, n] = activation(s_w[n] * sum_k x[m, k] * w[n, k] + b[n]) + r[m, n]

x is rounded to ``compute_dtype`` (default: its own dtype), sums are float32, and the result is cast once, to the dtype
of x.
"""

from __future__ import annotations

import torch

from tilewright.kernels.epilogue import finish


def int8_weight_only_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x float [..., K], weight int8 [N, K], weight_scale float32 [N], bias [N], residual [..., N] -> x.dtype [...,
    N].
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(compute_dtype or x.dtype).to(wide) @ weight.to(wide).t() * weight_scale.to(wide)
    return finish(y, bias, residual, activation, x.dtype)
