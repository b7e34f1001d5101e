"""Dynamic symmetric int8 quantisation of activations, one scale for each row (the definition).

    s[m] = max_k |v[m, k]| / 127,   q[m, k] = clamp(round_half_even(v[m, k] / s[m]), -127, 127),   v = float32(x) * c

``c`` is an optional scale for each channel [K] (SmoothQuant, Xiao et al. 2023, section 4). The division is IEEE float32
division, so every implementation agrees to the bit. A zero row has s = 1. A row that holds NaN or Inf has a
non-finite s and q = 0: the product 0 * s is NaN, which marks that row of the result and no other.
"""

from __future__ import annotations

import torch


def quantize_per_row(x: torch.Tensor, channel_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [..., K] float -> (int8 [..., K], float32 scale [...])."""
    v = x.float()
    if channel_scale is not None:
        v = v * channel_scale.float()
    if v.shape[-1] == 0:
        return v.to(torch.int8), v.new_ones(v.shape[:-1])
    largest = v.abs().amax(dim=-1)
    # Divided by a tensor: on CUDA, PyTorch multiplies by the reciprocal of a number, which rounds otherwise.
    scale = largest / torch.full_like(largest, 127)
    scale = torch.where(scale == 0, 1.0, scale)
    finite = torch.isfinite(scale).unsqueeze(-1)
    q = torch.where(finite, torch.round(v / scale.unsqueeze(-1)).clamp(-127, 127), 0.0)
    return q.to(torch.int8), scale
