"""W8A8 linear on a CPU: in one call of a C kernel, or through oneDNN's u8 x s8 product, prepacked once a weight."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from tilewright.kernels.cpu import linear
from tilewright.kernels.cpu.memory import scratch
from tilewright.kernels.cpu.probes import qlinear, why_no_qlinear
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import End, finish_rows
from tilewright.kernels.quantize.cpu import quantize_per_row, quantize_u8

#: 255 * 127 * K must stay below 2^31.
LARGEST_K = 66_000


def why_not(problem: Problem) -> str | None:
    """Why oneDNN does not take the problem, or None."""
    if 0 in (problem.m, problem.n, problem.k):
        return "nothing to multiply"
    if problem.k > LARGEST_K:
        return f"int32 sums of u8 products may overflow beyond K = {LARGEST_K}"
    return why_no_qlinear()


def why_not_native(problem: Problem) -> str | None:
    """Why the C kernel does not take the problem, or None."""
    if problem.k > LARGEST_K:
        return f"int32 sums of u8 products may overflow beyond K = {LARGEST_K}"
    return linear.why_not(problem)


def _prepack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.onednn.qlinear_prepack(weight.contiguous(), None), torch.zeros(len(weight), dtype=torch.int32)


def _multiply(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    out_dtype: torch.dtype,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    **end: Unpack[End],
) -> torch.Tensor:
    """x uint8 [M, K] with zero point 128, x_scale [M, 1] -> [M, N]."""
    prepacked, zeros = packed(weight, "onednn-int8", lambda: _prepack(weight))
    return finish_rows(qlinear(x, prepacked, weight_scale, zeros), x_scale, out_dtype, **end)


def int8_linear(x: torch.Tensor, channel_scale: torch.Tensor | None, **weight_and_end: Any) -> torch.Tensor:
    """See ``reference.int8_linear``."""
    q, scale = quantize_u8(x.reshape(-1, x.shape[-1]), channel_scale)
    y = _multiply(q, scale, x.dtype, **weight_and_end)
    return y.view(*x.shape[:-1], y.shape[1])


def int8_linear_quantized(
    x: torch.Tensor, x_scale: torch.Tensor, out_dtype: torch.dtype | None, **weight_and_end: Any
) -> torch.Tensor:
    """See ``reference.int8_linear_quantized``."""
    rows = x.reshape(-1, x.shape[-1])
    # Flipping the top bit adds 128: int8 becomes u8 with zero point 128.
    u8 = torch.bitwise_xor(
        rows.contiguous().view(torch.uint8), 128, out=scratch(tuple(rows.shape), torch.uint8, "quantized")
    )
    y = _multiply(u8, x_scale.reshape(-1, 1), out_dtype or torch.float32, **weight_and_end)
    return y.view(*x.shape[:-1], y.shape[1])


#: Sums of this many products of int8 values are exact in float32: 1040 * 127 * 127 < 2^24.
EXACT_FLOAT_COLUMNS = 1024


def float_int8_linear_quantized(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out_dtype: torch.dtype | None,
    **end: Unpack[End],
) -> torch.Tensor:
    """See ``reference.int8_linear_quantized``: float32 products of few enough columns to be exact, added up as int32.

    For CPUs without a usable integer product.
    """
    rows, n = x.reshape(-1, x.shape[-1]), len(weight)
    total = torch.zeros(len(rows), n, dtype=torch.int32)
    for x_part, w_part in zip(rows.split(EXACT_FLOAT_COLUMNS, 1), weight.split(EXACT_FLOAT_COLUMNS, 1), strict=True):
        total += (x_part.float() @ w_part.float().t()).to(torch.int32)
    y = finish_rows(total.float().mul_(weight_scale), x_scale.reshape(-1, 1), out_dtype or torch.float32, **end)
    return y.view(*x.shape[:-1], n)


def float_int8_linear(x: torch.Tensor, channel_scale: torch.Tensor | None, **weight_and_end: Any) -> torch.Tensor:
    """See ``reference.int8_linear`` and ``float_int8_linear_quantized``."""
    q, scale = quantize_per_row(x, channel_scale)
    return float_int8_linear_quantized(q, scale, out_dtype=x.dtype, **weight_and_end)
