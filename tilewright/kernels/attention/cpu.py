"""Attention by the C kernel: short sequences, whose scores stay in the caches of a core.

PyTorch's CPU kernel multiplies matrices block by block; for the 22 tokens of a sentence, 32 sentences and 12 heads of
width 32 it takes 1.8 ms a call, of which the arithmetic is a tenth (two cores of a Zen 4).
"""

from __future__ import annotations

import ctypes

import torch

from tilewright.kernels.attention.reference import default_scale
from tilewright.kernels.cpu import native, steps
from tilewright.kernels.cpu.memory import scratch
from tilewright.kernels.dispatch.problem import Problem

#: Beyond so many keys, scores and packed keys outgrow the caches that the kernel counts on.
MOST_KEYS = 512
#: Beyond this width of a head likewise.
WIDEST = 256
#: Below this many products a second thread costs more than it brings.
_GRAIN = 65536


class Job(ctypes.Structure):
    """``attention`` of attention.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "mask", "y", "scratch")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys", "width", "value_width")),
        *((name, ctypes.c_int64 * 3) for name in ("q_stride", "k_stride", "v_stride")),
        ("mask_stride", ctypes.c_int64 * 4),
        ("mask_is_bytes", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]


def why_not(problem: Problem) -> str | None:
    """Why the C kernel does not take the problem (m queries of all heads, n keys, heads k wide), or None."""
    if problem.x_dtype != torch.float32:
        return f"takes float32, not {problem.x_dtype}"
    if 0 in (problem.m, problem.n, problem.k):
        return "nothing to attend to"
    if problem.n > MOST_KEYS:
        return f"takes {MOST_KEYS} keys at most, not {problem.n}"
    if problem.k > WIDEST:
        return f"takes heads of width {WIDEST} at most, not {problem.k}"
    return native.why_no_native() or (None if steps.lanes() else f"is not built for {native.isa()}")


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """See ``reference.attention``. The result is [B, L, H, E] in memory: merging the heads costs no copy."""
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    batch, heads, queries, width = query.shape
    kv_heads, keys, value_width = value.shape[1:]
    y = torch.empty(batch, queries, heads, value_width)
    mask_stride: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.float32):
            mask = mask.float()
        if mask.dim() and mask.stride(-1) > 1:
            mask = mask.contiguous()
        mask = mask.expand(batch, heads, queries, keys)
        mask_stride = mask.stride()
    threads = torch.get_num_threads() if batch * heads * queries * keys * (width + value_width) >= _GRAIN else 1
    job = Job(
        *(t.data_ptr() for t in (query, key, value)),
        None if mask is None else mask.data_ptr(),
        y.data_ptr(),
        None,
        *(batch, heads, kv_heads, queries, keys, width, value_width),
        *(t.stride()[:3] for t in (query, key, value)),
        mask_stride,
        mask is not None and mask.dtype == torch.bool,
        causal,
        default_scale(query, scale),
        threads,
    )
    address = ctypes.addressof(job)
    floats = native.function("attention_scratch")(address) * threads
    job.scratch = scratch((floats,), torch.float32, "attention").data_ptr()
    native.function("attention")(address)
    return y.transpose(1, 2)
