"""A drop-in linear layer with int8 weights and statically quantised activations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from tilewright.kernels.activation import apply_activation
from tilewright.kernels.dispatch.derivatives import is_transformed, joined, straight_through, wide
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats.int8 import Int8
from tilewright.nn.nested import on_rows
from tilewright.nn.quantized_linear import QuantizedLinear
from tilewright.nn.weight_holder import CODES

Layer = TypeVar("Layer", bound="Int8StaticLinear")


class Int8StaticLinear(QuantizedLinear):
    """int8 weights and activations (W8A8), activations quantised with one scale that is known before the call.

    q = clamp(round(x / input_scale), -127, 127), then as ``kernels.int8_linear`` of quantised activations.
    ``input_scale`` float32 without dimensions is read as a number when it is loaded, which costs the one wait for the
    device; after writing into it by hand, call ``refresh``. Values beyond 127 steps are clipped. A row that holds NaN
    or an infinity comes out as NaN, and no other does. Where the input wants a gradient, the layer computes the same in
    float32, and derivatives of every mode pass the rounding as if that were not there.
    """

    scheme_name = "w8a8-static"
    op_name = "int8_linear_quantized"
    base_format = Int8()
    from_float_options: ClassVar[dict[str, Any]] = {"range_search": "minmax"}
    input_scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any):
        super().__init__(in_features, out_features, bias, **options)
        self.register_buffer("input_scale", torch.ones((), dtype=torch.float32, device=options.get("device")))
        #: The scale as a number.
        self.x_scale = 1.0

    @classmethod
    def from_float(  # type: ignore[override]
        cls: type[Layer],
        linear: nn.Linear,
        *,
        input_scale: float = 1.0,
        range_search: str = "minmax",
        activation: str = "none",
    ) -> Layer:
        """The quantised twin of ``linear``, sharing its bias. range_search: "minmax" or "mse". Raises ValueError for a
        scale that is not positive and finite.
        """
        if not (input_scale > 0 and math.isfinite(input_scale)):
            raise ValueError(f"input_scale must be positive and finite, not {input_scale}")
        module = super().from_float(linear, range_search=range_search, activation=activation)
        module.input_scale = torch.tensor(input_scale, dtype=torch.float32, device=linear.weight.device)
        module.refresh()
        return module

    def refresh(self) -> None:
        """Read the scale anew from its buffer, if that holds a value. Waits for the device."""
        if not self.input_scale.is_meta:
            self.x_scale = float(self.input_scale)

    def why_bad_buffer(self, name: str, value: torch.Tensor) -> str | None:
        """A scale that is not positive and finite."""
        if name == "input_scale" and not (value > 0 and value.isfinite()):
            return f"it must be positive and finite, not {float(value)}"
        return super().why_bad_buffer(name, value)

    def problem(self, m: int = 1, dtype: torch.dtype | None = None) -> Problem:
        """What the router is asked for ``m`` rows, which are int8 by then."""
        return dataclasses.replace(super().problem(m, dtype), x_dtype=torch.int8)

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """input float [..., in_features], residual [..., out_features] -> input.dtype [..., out_features]."""
        x = input
        if x.is_nested:
            return on_rows(self, x, residual)
        self._check_input(x)
        if x.dim() == 4:  # four dimensions are an image to the quantiser, with columns last but one
            rest = None if residual is None else residual.flatten(0, 1)
            return self.forward(x.flatten(0, 1), rest).unflatten(0, x.shape[:2])
        if is_transformed():
            return straight_through(self._integers, self._differentiable, x, residual)
        if torch.is_grad_enabled() and x.requires_grad:
            return self._differentiable(x, residual)
        return self._integers(x, residual)

    def _integers(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """By the operators."""
        kind = x.device.type
        if kind != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        q, marks = torch.ops.tilewright.quantize_per_tensor_marked(x.detach(), self.x_scale, x.dim() - 1)
        rows = self.input_scale + marks
        return torch.ops.tilewright.int8_linear_quantized(
            q, rows, self._buffers[CODES], self.weight_scale, self.bias, residual, self.activation, x.dtype
        )

    def _differentiable(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """The same in float32, or float64 for x of that."""
        dtype = wide(x)
        rows = x.to(dtype)
        rounded = (rows / self.x_scale).round().clamp(-127, 127) * self.x_scale
        rows = joined(torch.where(rows.isfinite(), rounded, torch.nan), rows)
        y = F.linear(rows, self.dequantize_weight().to(dtype), None if self.bias is None else self.bias.to(dtype))
        y = apply_activation(y, self.activation)
        return (y if residual is None else y + residual).to(x.dtype)

    def extra_repr(self) -> str:
        """As of ``QuantizedLinear``, then the scale."""
        return f"{super().extra_repr()}, input_scale={self.x_scale:.4g}"
