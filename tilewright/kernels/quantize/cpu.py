"""Per-row int8 quantisation on a CPU: the C kernel where there is one, else few passes of PyTorch over blocks.

``(v / s) + 1.5 * 2^23`` rounds to an integer, half to even, and leaves it in the low byte of the float's bits: one
division, one addition and one narrowing copy replace division, rounding, clamp and conversion.
"""

from __future__ import annotations

import functools
import math

import torch

from tilewright.kernels.cpu import native
from tilewright.kernels.cpu.memory import BLOCK_ELEMENTS, scratch
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.quantize import reference

_ROUNDER = 12582912.0  # 1.5 * 2^23: adding it leaves no room for a fraction
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def why_not(problem: Problem) -> str | None:
    """Takes every problem on a CPU."""
    return None


@functools.lru_cache(maxsize=64)
def _rounders(k: int, zero_point: int) -> torch.Tensor:
    """The rounding constant [K]: against a vector ``addcdiv`` runs vectorised, against a single number it does not."""
    with torch.inference_mode(False):
        return torch.full((k,), _ROUNDER + zero_point)


def _quantize_block(
    x: torch.Tensor, channel_scale: torch.Tensor | None, zero_point: int, q: torch.Tensor
) -> torch.Tensor:
    """Fill ``q`` [M, K] (int8, or uint8 with a zero point) and return the scale [M, 1]."""
    shape = tuple(x.shape)
    t, bits = scratch(shape, torch.float32, "quantize"), scratch(shape, torch.int32, "quantize")
    if channel_scale is not None:
        x = torch.mul(x, channel_scale, out=t)
    largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
    scale = largest.float().div_(127)
    low, high = torch.aminmax(scale)
    if low.item() == 0:
        scale.masked_fill_(scale == 0, 1)
        low, high = torch.aminmax(scale)
    if not (low.item() >= _SMALLEST_NORMAL and high.item() < math.inf):  # NaN, Inf, or quotients that need the clamp
        exact, scale = reference.quantize_per_row(x)
        torch.add(exact.to(torch.int32), zero_point, out=bits)
        q.copy_(bits)
        return scale.unsqueeze(-1)
    if x.dtype == torch.float32:
        # 1 * x / s + rounder, in this order and each rounded: one pass for two.
        torch.addcdiv(_rounders(shape[1], zero_point), x, scale, out=t)
    else:
        torch.div(x, scale, out=t).add_(_ROUNDER + zero_point)
    q.copy_(bits)
    return scale


def _quantize(x: torch.Tensor, channel_scale: torch.Tensor | None, zero_point: int, q: torch.Tensor) -> torch.Tensor:
    m, k = x.shape
    if x.dtype == torch.float64:
        x = x.float()
    if channel_scale is not None:
        channel_scale = channel_scale.float().contiguous()
    scale = torch.empty(m, 1)
    if native.quantize_rows(x, channel_scale, zero_point, q, scale):
        return scale
    rows = max(1, BLOCK_ELEMENTS // k)
    if m <= rows:
        return _quantize_block(x, channel_scale, zero_point, q)
    for i in range(0, m, rows):
        scale[i : i + rows] = _quantize_block(x[i : i + rows], channel_scale, zero_point, q[i : i + rows])
    return scale


def quantize_per_row(x: torch.Tensor, channel_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.quantize_per_row``."""
    if not x.numel():
        return reference.quantize_per_row(x, channel_scale)
    q = torch.empty(x.shape, dtype=torch.int8)
    k = x.shape[-1]
    scale = _quantize(x.reshape(-1, k), channel_scale, 0, q.view(-1, k))
    return q, scale.reshape(x.shape[:-1])


def quantize_u8(x: torch.Tensor, channel_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [M, K] -> (uint8 [M, K] with zero point 128 in scratch memory, float32 scale [M, 1]); M and K are not 0."""
    q = scratch(tuple(x.shape), torch.uint8, "quantized")
    return q, _quantize(x, channel_scale, 128, q)
