"""Attention by ``torch.nn.functional.scaled_dot_product_attention``, which chooses among kernels of its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``reference.attention``. The result lies in memory as [B, L, H, E], as that of the C kernel does."""
    groups = query.shape[1] // max(key.shape[1], 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if sinks is not None:
        key, value, mask, causal = _with_a_key_of(sinks, query, key, value, mask, causal)
    if causal and scale is not None and scale <= 0:
        # Its CPU kernel multiplies the minus infinities of the triangle by the scale: NaN, or zeros.
        query, scale = query * scale, 1.0
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def _with_a_key_of(
    sinks: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """Key, value and mask of an attention without sinks, and whether it is causal: one more key of zeros, whose score
    is what the mask adds, and whose value is zeros.
    """
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    added = query.new_zeros(batch, heads, queries, keys + 1)
    added[..., keys] = sinks[..., None]
    scores = added[..., :keys]
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -math.inf)
    elif mask is not None:
        scores += mask
    if causal:
        scores.masked_fill_(torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(1), -math.inf)
    key, value = (torch.cat((t, t.new_zeros(*t.shape[:2], 1, t.shape[3])), dim=2) for t in (key, value))
    return key, value, added, False
