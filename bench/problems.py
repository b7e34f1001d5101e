"""Arguments for every operator, and what their result must be: one source for tests, emulation and benchmarks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.activation import apply_activation
from tilewright.kernels.formats import int4, sparse24
from tilewright.kernels.formats.sparse24 import Sparse24
from tilewright.kernels.linear import dequantized_weight
from tilewright.kernels.quantize.reference import quantize_per_row

FOLDERS = {
    "quantize_per_row": "quantize",
    "rms_norm_quantize": "norm_quantize",
    "layer_norm_quantize": "norm_quantize",
    "int8_linear": "int8_linear",
    "int8_linear_quantized": "int8_linear",
    "int8_weight_only_linear": "int8_weight_only_linear",
    "int4_linear": "int4_linear",
    "int4_int8_linear": "int4_int8_linear",
    "sparse24_linear": "sparse24_linear",
    "sparse24_int8_linear": "sparse24_linear",
    "sparse24_int4_linear": "sparse24_linear",
}
QUANTIZERS = ("quantize_per_row", "rms_norm_quantize", "layer_norm_quantize")
SPARSE = ("sparse24_linear", "sparse24_int8_linear", "sparse24_int4_linear")
LINEAR = tuple(op for op in FOLDERS if op not in QUANTIZERS)


@dataclass(frozen=True)
class Shape:
    """x [m, k] of ``dtype`` and n output features. group_size, symmetric: of int4 weights (None: one group, the row).

    dtype is that of the result; for ``int8_linear_quantized`` x itself is int8.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    group_size: int | None = None
    symmetric: bool = True
    bias: bool = True
    residual: bool = False
    activation: str = "none"
    compute_dtype: torch.dtype | None = None


def reference(op: str) -> Callable[..., Any]:
    """The definition of ``op``."""
    return getattr(importlib.import_module(f"tilewright.kernels.{FOLDERS[op]}.reference"), op)


def make_arguments(op: str, shape: Shape, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Arguments of ``op`` by name, random and from ``seed`` alone, so alike on every device. Sums are of order 1."""
    if device == "meta":
        with torch.device("meta"):
            return _arguments(op, shape, None)
    arguments = _arguments(op, shape, torch.Generator().manual_seed(seed))
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def _arguments(op: str, shape: Shape, generator: torch.Generator | None) -> dict[str, Any]:
    def normal(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    def positive(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator) + 0.5

    def integers(low: int, high: int, *size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator, dtype=dtype)

    m, n, k = shape.m, shape.n, shape.k
    x = normal(m, k, dtype=shape.dtype)
    if op == "quantize_per_row":
        return {"x": x, "channel_scale": positive(k) if shape.bias else None}
    if op in QUANTIZERS:
        affine = {"weight": normal(k, dtype=shape.dtype), "bias": normal(k, dtype=shape.dtype)}
        return {"x": x, **{name: affine[name] for name in affine if name == "weight" or op == "layer_norm_quantize"}}
    end = {
        "bias": normal(n, dtype=shape.dtype) if shape.bias else None,
        "residual": normal(m, n, dtype=shape.dtype) if shape.residual else None,
        "activation": shape.activation,
    }
    spread = max(k, 1) ** -0.5
    if op in ("int4_linear", "int4_int8_linear"):
        group_size = shape.group_size or max(k, 1)
        groups = int4.group_count(k, group_size)
        zero = None
        if not shape.symmetric:
            zero = integers(-(2**31), 2**31, -(-n // 8), groups, dtype=torch.int32)
        packed = integers(-(2**31), 2**31, n, -(-k // 8), dtype=torch.int32)
        weight = {
            "weight_packed": packed,
            "weight_scale": (positive(n, groups) * (spread / 5)).to(shape.dtype),
            "weight_zero": zero,
            "group_size": group_size,
        }
        if op == "int4_linear":
            weight["compute_dtype"] = shape.compute_dtype
        return {"x": x, **weight, **end}
    if op in SPARSE:
        return {"x": x, **_sparse_weight(op, shape, normal, positive, integers), **end}
    weight = {
        "weight": integers(-127, 128, n, k, dtype=torch.int8),
        "weight_scale": positive(n) * (spread / 73),
    }
    if op == "int8_linear_quantized":
        x_q = integers(-127, 128, m, k, dtype=torch.int8)
        return {"x": x_q, "x_scale": positive(m) / 73, **weight, **end, "out_dtype": shape.dtype}
    if op == "int8_weight_only_linear":
        weight["compute_dtype"] = shape.compute_dtype
    return {"x": x, **weight, **end}


def _sparse_weight(
    op: str,
    shape: Shape,
    normal: Callable[..., torch.Tensor],
    positive: Callable[..., torch.Tensor],
    integers: Callable[..., torch.Tensor],
) -> dict[str, Any]:
    """Random places and values: sums are of order 1 with half the weights."""
    n, k = shape.n, shape.k
    kept, groups = sparse24.kept_count(k), sparse24.group_count(k)
    spread = max(k / 2, 1) ** -0.5
    nibbles = torch.tensor(sparse24.VALID, dtype=torch.uint8)[integers(0, 6, n, groups, dtype=torch.int64)]
    pairs = F.pad(nibbles, (0, groups % 2))
    weight: dict[str, Any] = {"weight_meta": pairs[:, ::2] | pairs[:, 1::2] << 4}
    if op == "sparse24_linear":
        values = normal(n, kept, dtype=torch.float32) * spread
        dtype = shape.compute_dtype or shape.dtype
        return {"weight_values": values.to(dtype), **weight, "compute_dtype": shape.compute_dtype}
    if op == "sparse24_int8_linear":
        values = integers(-127, 128, n, kept, dtype=torch.int8)
        return {"weight_values": values, **weight, "weight_scale": positive(n) * (spread / 73)}
    group_size = min(shape.group_size or k, k) or 1
    scales = int4.group_count(k, group_size)
    return {
        "weight_values": integers(-(2**31), 2**31, n, -(-kept // 8), dtype=torch.int32),
        **weight,
        "weight_scale": (positive(n, scales) * (spread / 5)).to(shape.dtype),
        "weight_zero": None if shape.symmetric else integers(-(2**31), 2**31, -(-n // 8), scales, dtype=torch.int32),
        "group_size": group_size,
        "compute_dtype": shape.compute_dtype,
    }


def dense_weight(op: str, arguments: dict[str, Any]) -> torch.Tensor:
    """The float64 weight [N, K] that the quantised one of a linear operator stands for."""
    if op in SPARSE:
        return dequantized_weight(Sparse24, arguments, torch.float64)
    if "weight_packed" in arguments:
        k = arguments["x"].shape[-1]
        packed = (arguments[name] for name in ("weight_packed", "weight_scale", "weight_zero"))
        return int4.dequantize(*packed, arguments["group_size"], k, dtype=torch.float64)
    return arguments["weight"].double() * arguments["weight_scale"].double().unsqueeze(-1)


def exact_result(op: str, arguments: dict[str, Any]) -> torch.Tensor:
    """The linear operator in float64 from the operands as it rounds them: int8 activations, or x in compute_dtype."""
    x = arguments["x"]
    if op == "int8_linear_quantized":
        rows = x.double() * arguments["x_scale"].double().unsqueeze(-1)
    elif op in ("int8_linear", "int4_int8_linear", "sparse24_int8_linear"):
        q, scale = quantize_per_row(x, arguments.get("channel_scale"))
        rows = q.double() * scale.double().unsqueeze(-1)
    else:
        rows = x.to(arguments["compute_dtype"] or x.dtype).double()
    bias, residual = (None if arguments[name] is None else arguments[name].double() for name in ("bias", "residual"))
    y = apply_activation(F.linear(rows, dense_weight(op, arguments), bias), arguments["activation"])
    return y if residual is None else y + residual


def plain_result(op: str, arguments: dict[str, Any]) -> torch.Tensor:
    """What a user without this package would write, in the same dtype; where activations are int8, the reference."""
    if "compute_dtype" not in arguments:
        return reference(op)(**arguments)
    x, bias, residual = (arguments[name] for name in ("x", "bias", "residual"))
    dtype = arguments["compute_dtype"] or x.dtype
    y = F.linear(x.to(dtype), dense_weight(op, arguments).to(dtype), None if bias is None else bias.to(dtype))
    y = apply_activation(y, arguments["activation"]).to(x.dtype)
    return y if residual is None else y + residual
