"""Every quantised module class with its options: what a promise is checked on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from tilewright.kernels.formats import sparse24
from tilewright.nn import (
    Int4Linear,
    Int8ActInt4WeightLinear,
    Int8Linear,
    Int8StaticLinear,
    Int8WeightOnlyLinear,
    QuantizedLinear,
    Sparse24Int4Linear,
    Sparse24Int8Linear,
    Sparse24Linear,
)

K, N = 80, 40


@dataclass(frozen=True)
class Layer:
    """A module class and the options its ``from_float`` gets."""

    name: str
    cls: type[QuantizedLinear]
    options: dict[str, Any] = field(default_factory=dict)
    bias: bool = True
    smooth: bool = False

    def make(self, k: int = K, n: int = N, dtype: torch.dtype = torch.float32, **more: Any) -> QuantizedLinear:
        """A module quantised from a random layer [n, k]."""
        return self.quantize(self.linear(k, n, dtype), **more)

    def linear(self, k: int = K, n: int = N, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """A random layer; for 2:4 weights one that is pruned already, so that what remains is rounding."""
        linear = nn.Linear(k, n, self.bias, dtype=dtype)
        if self.name.startswith("sparse24"):
            with torch.no_grad():
                linear.weight *= sparse24.best_mask(linear.weight.abs())
        return linear

    def quantize(self, linear: nn.Linear, **more: Any) -> QuantizedLinear:
        options = {**self.options, **more}
        if self.smooth:
            options["channel_scale"] = torch.rand(linear.in_features) + 0.5
        from_float: Callable[..., QuantizedLinear] = self.cls.from_float  # type: ignore[attr-defined]
        return from_float(linear, **options)


LAYERS = (
    Layer("int8", Int8Linear),
    Layer("int8-smooth-no_bias", Int8Linear, {"range_search": "mse"}, bias=False, smooth=True),
    Layer("int8-static", Int8StaticLinear, {"input_scale": 0.03}),
    Layer("int8-weight-only", Int8WeightOnlyLinear),
    Layer("int8-weight-only-float32", Int8WeightOnlyLinear, {"compute_dtype": None}, bias=False),
    Layer("int4", Int4Linear, {"group_size": 32, "symmetric": True}),
    Layer("int4-asymmetric-float32", Int4Linear, {"group_size": -1, "symmetric": False, "compute_dtype": None}),
    Layer(
        "int4-no_bias", Int4Linear, {"symmetric": True, "scale_dtype": "float32", "range_search": "minmax"}, bias=False
    ),
    Layer("int8-activation-int4-weight", Int8ActInt4WeightLinear, {"group_size": 32, "symmetric": True}),
    Layer("int8-activation-int4-weight-smooth", Int8ActInt4WeightLinear, {"symmetric": False}, bias=False, smooth=True),
    Layer("sparse24", Sparse24Linear),
    Layer("sparse24-float32", Sparse24Linear, {"values_dtype": None, "compute_dtype": None}, bias=False),
    Layer("sparse24-int8", Sparse24Int8Linear),
    Layer("sparse24-int8-smooth-no_bias", Sparse24Int8Linear, {"range_search": "mse"}, bias=False, smooth=True),
    Layer("sparse24-int4", Sparse24Int4Linear, {"group_size": 32}),
    Layer(
        "sparse24-int4-asymmetric-float32",
        Sparse24Int4Linear,
        {"group_size": -1, "symmetric": False, "compute_dtype": None},
        bias=False,
    ),
)
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=[layer.name for layer in LAYERS])
