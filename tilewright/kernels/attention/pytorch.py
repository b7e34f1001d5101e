"""Attention by ``torch.nn.functional.scaled_dot_product_attention``, which chooses among kernels of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """See ``reference.attention``. The result lies in memory as [B, L, H, E], as that of the C kernel does."""
    groups = query.shape[1] // max(key.shape[1], 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if causal and scale is not None and scale <= 0:
        # Its CPU kernel multiplies the minus infinities of the triangle by the scale: NaN, or zeros.
        query, scale = query * scale, 1.0
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)
    return y.transpose(1, 2).contiguous().transpose(1, 2)
