"""Arguments for every operator, and what their result must be: one source for tests, emulation and benchmarks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.activation import apply_activation
from tilewright.kernels.dispatch import card
from tilewright.kernels.dispatch.card import Card, card_of, cards
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats import int4
from tilewright.kernels.formats.sparse24 import Sparse24
from tilewright.kernels.linear import dequantized_weight
from tilewright.kernels.quantize.reference import quantize_per_row

#: Operators on rows: what makes int8 rows of float ones, and linear layers, of which some have 2:4 weights.
_PAIRS = tuple(each for each in cards() if each.schema.endswith("-> (Tensor, Tensor)"))
QUANTIZERS = tuple(each.name for each in _PAIRS if "float scale" not in each.schema)
LINEAR = tuple(each.name for each in cards() if each.weight_of is not None)
SPARSE = tuple(op for op in LINEAR if op.startswith("sparse24_"))
OPS = (*QUANTIZERS, *LINEAR)


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


def _card(op: str) -> Card:
    found = card_of(op)
    if found is None:
        raise ValueError(f"{op!r} has no card")
    return found


def reference(op: str) -> Callable[..., Any]:
    """The definition of ``op``."""
    return getattr(importlib.import_module(f"{_card(op).package}.reference"), op)


def problem_of(op: str, shape: Shape) -> Problem:
    """What the operator's card draws arguments for. Scales of int4 weights have the dtype of the result."""
    rows_are_int8 = "x_scale" in _card(op).schema
    return Problem(
        op,
        shape.m,
        shape.n,
        shape.k,
        torch.int8 if rows_are_int8 else shape.dtype,
        group_size=shape.group_size,
        symmetric=shape.symmetric,
        scale_dtype=shape.dtype,
        compute_dtype=shape.compute_dtype,
        activation=shape.activation,
        bias=shape.bias,
        residual=shape.residual,
        out_dtype=shape.dtype if rows_are_int8 else None,
    )


def make_arguments(op: str, shape: Shape, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Arguments of ``op`` by name, random and from ``seed`` alone, so alike on every device. Sums are of order 1."""
    drawn = card.make_arguments(problem_of(op, shape), "meta" if device == "meta" else "cpu", seed)
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in drawn.items()}


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
