"""What attention.c is told, and what it takes."""

from __future__ import annotations

import ctypes

import torch

from tilewright.kernels.cpu import native, steps
from tilewright.kernels.dispatch.problem import Problem

#: Beyond so many keys, scores and packed keys outgrow the caches that the kernel counts on.
MOST_KEYS = 512
#: Beyond this width of a head likewise.
WIDEST = 256
#: Of what is served, but that more than ``FEW_QUERIES`` of bfloat16 are handed on to PyTorch.
DTYPES = (torch.float32, torch.bfloat16)
#: Up to so many queries attention_few.c reads keys where they lie, any number of them (``FEW_QUERIES`` of attention.h).
FEW_QUERIES = 4


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
        *((name, ctypes.c_void_p) for name in ("new_k", "new_v")),
        *((name, ctypes.c_int64 * 3) for name in ("new_k_stride", "new_v_stride")),
        *((name, ctypes.c_int64) for name in ("new_first", "new_count")),
        ("done", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("k_scale", "v_scale", "errors")),
        *((name, ctypes.c_int64 * 2) for name in ("k_scale_stride", "v_scale_stride", "errors_stride")),
        ("sinks", ctypes.c_void_p),
        ("sinks_stride", ctypes.c_int64 * 2),
        ("bfloat16", ctypes.c_int64),
    ]


def why_not(problem: Problem) -> str | None:
    """Why the C kernel does not take the problem (m queries of all heads, n keys, heads k wide), or None."""
    if problem.x_dtype not in DTYPES:
        return f"takes float32 and bfloat16, not {problem.x_dtype}"
    if 0 in (problem.m, problem.n, problem.k):
        return "nothing to attend to"
    if problem.n > MOST_KEYS:
        return f"takes {MOST_KEYS} keys at most, not {problem.n}"
    if problem.k > WIDEST:
        return f"takes heads of width {WIDEST} at most, not {problem.k}"
    return native.why_no_native() or (None if steps.lanes() else f"is not built for {native.isa()}")


def routed_keys(queries: int, keys: int) -> int:
    """The keys of the problem by which the router chooses: few queries have no need of caches."""
    return min(keys, MOST_KEYS) if queries <= FEW_QUERIES else keys


def job(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    y: torch.Tensor,
    threads: int,
    sinks: torch.Tensor | None = None,
) -> Job:
    """What attention.c is told, but for the scratch memory and the counters ``done``. Query, key and value are float32,
    or bfloat16 of up to ``FEW_QUERIES`` queries, their last dimension contiguous, that of the mask, float32 or bool,
    contiguous or expanded; y: contiguous [B, L, H, E] of their dtype; sinks: float32.
    """
    batch, heads, queries, width = query.shape
    kv_heads, keys, value_width = value.shape[1:]
    mask_stride: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        mask_stride = mask.expand(batch, heads, queries, keys).stride()
    described = Job(
        *(t.data_ptr() for t in (query, key, value)),
        None if mask is None else mask.data_ptr(),
        y.data_ptr(),
        None,
        *(batch, heads, kv_heads, queries, keys, width, value_width),
        *(t.stride()[:3] for t in (query, key, value)),
        mask_stride,
        mask is not None and mask.dtype == torch.bool,
        causal,
        scale,
        threads,
    )
    described.bfloat16 = query.dtype == torch.bfloat16
    if sinks is not None:
        described.sinks, described.sinks_stride = sinks.data_ptr(), sinks.expand(batch, heads).stride()
    return described
