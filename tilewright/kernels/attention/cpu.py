"""Attention by the C kernels: short sequences, whose scores stay in the caches of a core, and few queries.

PyTorch's CPU kernel multiplies matrices block by block; for the 22 tokens of a sentence, 32 sentences and 12 heads of
width 32 it takes 1.8 ms a call, of which the arithmetic is a tenth (two cores of a Zen 4).
"""

from __future__ import annotations

import ctypes

import torch

from tilewright.kernels.attention import pytorch
from tilewright.kernels.attention.reference import default_scale
from tilewright.kernels.cpu import native
from tilewright.kernels.cpu.attention import FEW_QUERIES, job, why_not
from tilewright.kernels.cpu.memory import scratch

__all__ = ["attention", "why_not"]

#: Below this many products a second thread costs more than it brings.
_GRAIN = 65536
#: Floats of scratch memory are asked for in multiples of this, so that a growing number of keys asks for the same.
_STEP = 1 << 14


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``reference.attention``. The result is [B, L, H, E] in memory: merging the heads costs no copy."""
    if query.dtype == torch.bfloat16 and query.shape[2] > FEW_QUERIES:
        return pytorch.attention(query, key, value, mask, causal, scale, sinks)  # which multiplies bfloat16
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    batch, heads, queries, width = query.shape
    kv_heads, keys, value_width = value.shape[1:]
    y = torch.empty(batch, queries, heads, value_width, dtype=query.dtype)
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.float32):
            mask = mask.float()
        if mask.dim() and mask.stride(-1) > 1:
            mask = mask.contiguous()
    if sinks is not None:
        sinks = sinks.float()
    threads = torch.get_num_threads() if batch * heads * queries * keys * (width + value_width) >= _GRAIN else 1
    described = job(query, key, value, mask, causal, default_scale(query, scale), y, threads, sinks)
    address = ctypes.addressof(described)
    floats = native.function("attention_scratch")(address)
    described.scratch = scratch((-(-floats // _STEP) * _STEP,), torch.float32, "attention").data_ptr()
    described.done = scratch((batch * kv_heads,), torch.int32, "attention, done").data_ptr()
    native.function("attention")(address)
    return y.transpose(1, 2)
