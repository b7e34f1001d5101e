"""The operators once more, in NumPy float64 and int64 and straight from their equations: what references are held to.

Nothing of the package is used here, so a mistake in a format or a reference cannot hide in its own test.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch


def array(t: torch.Tensor) -> np.ndarray:
    """Any tensor as float64, exactly."""
    return t.detach().double().numpy()


def nibbles(packed: torch.Tensor, columns: int) -> np.ndarray:
    """int32 words [R, W] -> integers 0..15 [R, columns], one bit at a time."""
    words = packed.numpy().astype(np.int64) & 0xFFFFFFFF
    out = np.zeros((words.shape[0], columns), dtype=np.int64)
    for column in range(columns):
        for bit in range(4):
            out[:, column] |= ((words[:, column // 8] >> (4 * (column % 8) + bit)) & 1) << bit
    return out


def int4_integers(
    packed: torch.Tensor, zero: torch.Tensor | None, group_size: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(u - z as int64 [N, K], group of each column [K])."""
    u, group = nibbles(packed, k), np.arange(k) // group_size
    if zero is None:
        return u - 8, group
    return u - nibbles(zero.t().contiguous(), len(u)).T[:, group], group


def int4_weight(
    packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group_size: int, k: int
) -> np.ndarray:
    """The dequantised weight [N, K]."""
    integers, group = int4_integers(packed, zero, group_size, k)
    return integers * array(scale)[:, group]


def activate(z: np.ndarray, name: str) -> np.ndarray:
    if name == "none":
        return z
    if name == "relu":
        return np.where(np.isnan(z), z, np.maximum(z, 0.0))
    if name == "silu":
        return z / (1.0 + np.exp(-z))
    if name == "relu6":
        return np.where(np.isnan(z), z, np.minimum(np.maximum(z, 0.0), 6.0))
    if name == "hardswish":
        return z * np.minimum(np.maximum(z + 3.0, 0.0), 6.0) / 6.0
    if name == "leaky_relu":
        return np.where(z < 0, 0.01 * z, z)
    if name == "gelu_tanh":
        return 0.5 * z * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))
    return 0.5 * z * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(z / math.sqrt(2.0)))


def finish(
    z: np.ndarray, bias: torch.Tensor | None, residual: torch.Tensor | None, activation: str = "none"
) -> torch.Tensor:
    if bias is not None:
        z = z + array(bias)
    y = activate(z, activation)
    return torch.from_numpy(np.array(y if residual is None else y + array(residual)))


def quantize(x: torch.Tensor, channel_scale: torch.Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(q int64 [..., K], scale float32 [...]) with float32 division, as the operator is defined."""
    v = x.detach().to(torch.float32).numpy().copy()
    if channel_scale is not None:
        v = v * channel_scale.to(torch.float32).numpy()
    q = np.zeros(v.shape, dtype=np.int64)
    scale = np.ones(v.shape[:-1], dtype=np.float32)
    for row in np.ndindex(*v.shape[:-1]):
        largest = np.max(np.abs(v[row])) if v.shape[-1] else np.float32(0)
        s = np.float32(largest / np.float32(127))
        if s == 0:
            s = np.float32(1)
        scale[row] = s
        if np.isfinite(s):
            q[row] = np.clip(np.rint(v[row] / s), -127, 127).astype(np.int64)
    return q, scale


def int8_linear(q: np.ndarray, x_scale: np.ndarray, weight: torch.Tensor, weight_scale: torch.Tensor) -> np.ndarray:
    """Integer sums in int64, times both scales in float64."""
    return (q @ weight.numpy().astype(np.int64).T) * x_scale.astype(np.float64)[..., None] * array(weight_scale)


def weight_only(x: torch.Tensor, weight: np.ndarray) -> np.ndarray:
    return array(x) @ weight.T


def int4_int8_linear(q: np.ndarray, x_scale: np.ndarray, int4: dict[str, Any]) -> np.ndarray:
    """int4: weight_packed, weight_scale, weight_zero, group_size."""
    k = q.shape[-1]
    integers, group = int4_integers(int4["weight_packed"], int4["weight_zero"], int4["group_size"], k)
    scale = array(int4["weight_scale"])
    total = np.zeros((*q.shape[:-1], len(scale)))
    for g in range(scale.shape[1]):
        total = total + (q[..., group == g] @ integers[:, group == g].T) * scale[:, g]
    return total * x_scale.astype(np.float64)[..., None]


def dense_of_24(values: np.ndarray, meta: torch.Tensor, k: int) -> np.ndarray:
    """Kept values [N, 2 G] and their places -> the dense matrix [N, K], a column of kept values at a time."""
    groups = values.shape[1] // 2
    out = np.zeros((len(values), 4 * groups), dtype=values.dtype)
    bits, rows = meta.numpy().astype(np.int64), np.arange(len(values))
    for kept in range(values.shape[1]):
        group, which = divmod(kept, 2)
        place = bits[:, group // 2] >> (4 * (group % 2) + 2 * which) & 3
        out[rows, 4 * group + place] = values[:, kept]
    return out[:, :k]


def int4_values(
    packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group_size: int, k: int
) -> np.ndarray:
    """The kept values [N, 2 G] of an int4 2:4 weight with a scale for each ``group_size`` of ``k`` columns."""
    kept = 2 * -(-k // 4)
    if group_size >= k:
        return int4_weight(packed, scale, zero, max(kept, 1), kept)
    return int4_weight(packed, scale, zero, group_size // 2, kept)
