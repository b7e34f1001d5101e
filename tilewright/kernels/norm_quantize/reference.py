"""Layer norm and RMS norm followed at once by per-row int8 quantisation (the definition).

    layer norm: n = (x - mean(x)) / sqrt(var(x) + eps) * w + b        RMS norm: n = x / sqrt(mean(x^2) + eps) * w

in float32 (var is the biased variance), and n goes to ``quantize_per_row`` without being rounded to the dtype of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tilewright.kernels.quantize.reference import quantize_per_row


def _widen(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.float()


def layer_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [..., K] float; weight and bias [K] -> (int8 [..., K], float32 scale [...])."""
    return quantize_per_row(F.layer_norm(x.float(), x.shape[-1:], _widen(weight), _widen(bias), eps))


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [..., K] float; weight [K] -> (int8 [..., K], float32 scale [...])."""
    return quantize_per_row(F.rms_norm(x.float(), x.shape[-1:], _widen(weight), eps))
