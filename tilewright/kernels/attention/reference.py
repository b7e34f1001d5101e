"""Scaled dot-product attention (the definition).

    y[b, h, i, :] = sum_j p[i, j] v[b, h, j, :]
    p[i, :] = softmax_j(scale * q[b, h, i, :] . k[b, h, j, :] + mask[i, j])

It is what ``torch.nn.functional.scaled_dot_product_attention`` computes. With ``causal`` query i sees the keys j <= i.
A query that sees no key gives zeros. Fewer heads of k and v than of q: each serves as many neighbouring heads of q.
With ``sinks`` the softmax has one more score, sinks[h], which takes its part of the sum and brings no value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from tilewright.kernels.dispatch.derivatives import wide


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [B, H, L, D], key [B, G, S, D], value [B, G, S, E] of one float dtype, H a multiple of G; mask, which
    broadcasts to [B, H, L, S], bool (True: seen) or float (added); sinks float [H] or [B, H] -> [B, H, L, E] of that
    dtype. scale None is 1 / sqrt(D).
    """
    given = {"query": query, "key": key, "value": value, "mask": mask, "causal": causal, "scale": scale, "sinks": sinks}
    return smooth_attention(given).to(query.dtype)


def smooth_attention(arguments: Mapping[str, Any]) -> torch.Tensor:
    """The same before the cast, in float32, or float64 for such arguments: what derivatives are those of."""
    query, key, value, mask = (arguments[name] for name in ("query", "key", "value", "mask"))
    dtype = wide(query)
    groups = query.shape[1] // max(key.shape[1], 1)
    k, v = (t.to(dtype).repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query.to(dtype) @ k.transpose(-1, -2) * default_scale(query, arguments["scale"])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if arguments["causal"]:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if (sinks := arguments["sinks"]) is not None:
        scores = torch.cat((scores, sinks.to(dtype)[..., None, None].expand(*scores.shape[:-1], 1)), dim=-1)
    blind = (scores == -math.inf).all(dim=-1, keepdim=True)
    # Before the softmax too, whose derivative is NaN at a row of nothing but -inf.
    probabilities = torch.softmax(scores.masked_fill(blind, 0), dim=-1).masked_fill(blind, 0)
    return probabilities[..., : v.shape[2]] @ v


def default_scale(query: torch.Tensor, scale: float | None) -> float:
    """``scale``, or 1 / sqrt(D)."""
    return scale if scale is not None else 1 / math.sqrt(max(query.shape[-1], 1))
