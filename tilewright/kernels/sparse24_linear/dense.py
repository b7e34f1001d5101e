"""Linear layers on 2:4 weights, unpacked once for each layer and multiplied densely: on every device.

The dense weight is made at the first call and lives as long as the 2:4 one (``kernels.packed``). On a CPU this is the
fast path: no CPU multiplies 2:4 operands, and from a few rows on the multiplications take longer than reading the dense
weight does. On a GPU it serves the shapes that 2:4 does not pay for. int8 and int4 weights go to whatever serves the
dense operator there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.cpu_support import finish_rows
from tilewright.kernels.epilogue import finish
from tilewright.kernels.formats import sparse24
from tilewright.kernels.gradients import dequantized_weight
from tilewright.kernels.int4_linear.dequantize import wide_product
from tilewright.kernels.int8_weight_only_linear.cpu import library_dtype
from tilewright.kernels.packed import packed
from tilewright.kernels.problem import Problem
from tilewright.kernels.router import serve

#: Rows up to which a product that reads int4 beats one in bfloat16 on a CPU (384 x 384 to 4096 x 4096, two threads).
SMALL_INT4_BATCH = 8


def why_not(problem: Problem) -> str | None:
    """Why a dense product does not take the problem, or None."""
    return "nothing to multiply" if 0 in (problem.m, problem.n, problem.k) else None


def unpacked(weight_values: torch.Tensor, weight_meta: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [N, K] in ``dtype``, made once."""
    return packed(
        weight_values,
        f"2:4 unpacked, {k} columns, {dtype}",
        lambda: sparse24.unpack(weight_values, weight_meta, k).to(dtype),
        weight_meta,
    )


@functools.cache
def _has_prepacked_bfloat16() -> bool:
    """Whether oneDNN's prepacked bfloat16 product, a private operator of PyTorch, is there and right."""
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        with torch.inference_mode(False), torch.no_grad():
            x, w = (
                torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
                for shape in ((5, 33), (7, 33))
            )
            y = _multiply_prepacked(x, torch.ops.mkldnn._reorder_linear_weight(w, None))
            expected = x.double() @ w.double().t()
            return bool((y.double() - expected).norm() <= 4e-3 * expected.norm())
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False


def _multiply_prepacked(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _reorder(weight: torch.Tensor) -> torch.Tensor:
    """A bfloat16 weight [N, K] in oneDNN's order: a tensor of its own, which keeps nothing of ``weight``."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.to(torch.bfloat16), None)


def _prepacked(weight_values: torch.Tensor, weight_meta: torch.Tensor, k: int) -> torch.Tensor:
    return packed(
        weight_values,
        f"2:4 unpacked for oneDNN, {k} columns",
        lambda: _reorder(sparse24.unpack(weight_values, weight_meta, k)),
        weight_meta,
    )


def _cpu_product(
    x: torch.Tensor, weight_values: torch.Tensor, weight_meta: torch.Tensor, narrow: torch.dtype
) -> torch.Tensor:
    """x [M, K] times the transposed weight, in the dtype of the library's product."""
    k = x.shape[1]
    if narrow == torch.bfloat16 and _has_prepacked_bfloat16():
        return _multiply_prepacked(x.to(narrow).contiguous(), _prepacked(weight_values, weight_meta, k))
    # Without instructions for it, bfloat16 is as slow as float16 is everywhere; either is exact in float32.
    library = torch.float32 if narrow == torch.bfloat16 else library_dtype(narrow)
    dense = packed(
        weight_values,
        f"2:4 unpacked, {k} columns, {narrow} as {library}",
        lambda: sparse24.unpack(weight_values, weight_meta, k).to(narrow).to(library),
        weight_meta,
    )
    return F.linear(x.to(narrow).to(library), dense)


def sparse24_linear(
    x: torch.Tensor,
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See ``reference.sparse24_linear``."""
    narrow = compute_dtype or x.dtype
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    shape = (*x.shape[:-1], len(weight_values))
    plain = activation == "none" and residual is None and narrow == x.dtype and (bias is None or bias.dtype == narrow)
    if x.device.type == "cpu":
        if plain and narrow == torch.bfloat16 and _has_prepacked_bfloat16():
            weight = _prepacked(weight_values, weight_meta, x.shape[-1])
            return _multiply_prepacked(rows.contiguous(), weight, bias).view(shape)  # adds the bias and rounds once
        y = _cpu_product(rows, weight_values, weight_meta, narrow)
        y = y if y.dtype == torch.float64 else y.float()
        return finish_rows(y, None, bias, residual, activation, x.dtype).view(shape)
    weight = unpacked(weight_values, weight_meta, x.shape[-1], narrow)
    if plain:
        return F.linear(x, weight, bias)  # the library adds the bias and rounds once
    return finish(wide_product(rows.to(narrow), weight).view(shape), bias, residual, activation, x.dtype)


def _server(op: str, x: torch.Tensor, n: int, **facts: Any) -> Callable[..., torch.Tensor]:
    return serve(op, math.prod(x.shape[:-1]), n, x.shape[-1], x.dtype, x.device, **facts)


def sparse24_int8_linear(
    x: torch.Tensor,
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    channel_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``reference.sparse24_int8_linear``."""
    weight = unpacked(weight_values, weight_meta, x.shape[-1], torch.int8)
    function = _server(
        "int8_linear",
        x,
        len(weight),
        activation=activation,
        bias=bias is not None,
        residual=residual is not None,
    )
    return function(x, weight, weight_scale, bias, residual, activation, channel_scale)


def sparse24_int4_linear(
    x: torch.Tensor,
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    group_size: int,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See ``reference.sparse24_int4_linear``."""
    k, rows = x.shape[-1], math.prod(x.shape[:-1])
    narrow = compute_dtype or x.dtype
    if x.device.type == "cpu" and rows > SMALL_INT4_BATCH and narrow == torch.bfloat16 and _has_prepacked_bfloat16():
        arguments = {
            "x": x,
            "weight_values": weight_values,
            "weight_meta": weight_meta,
            "weight_scale": weight_scale,
            "weight_zero": weight_zero,
            "group_size": group_size,
        }
        dense = packed(
            weight_values,
            f"2:4 int4 dequantised for oneDNN, {k} columns in groups of {group_size}",
            lambda: _reorder(dequantized_weight(arguments)),
            weight_meta,
            weight_scale,
            weight_zero,
        )
        y = _multiply_prepacked(x.reshape(rows, k).to(narrow).contiguous(), dense).float()
        return finish_rows(y, None, bias, residual, activation, x.dtype).view(*x.shape[:-1], len(weight_values))
    weight = packed(
        weight_values,
        f"2:4 int4 unpacked, {k} columns in groups of {group_size}",
        lambda: sparse24.unpack_int4(weight_values, weight_meta, weight_zero, group_size, k),
        weight_meta,
        weight_zero,
    )
    function = _server(
        "int4_linear",
        x,
        len(weight),
        activation=activation,
        bias=bias is not None,
        residual=residual is not None,
        compute_dtype=compute_dtype,
        group_size=group_size,
        symmetric=weight_zero is None,
        scale_dtype=weight_scale.dtype,
    )
    return function(
        x,
        weight,
        weight_scale,
        weight_zero,
        bias,
        residual,
        group_size=group_size,
        activation=activation,
        compute_dtype=compute_dtype,
    )
