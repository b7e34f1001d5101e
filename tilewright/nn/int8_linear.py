"""Drop-in linear layers with int8 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tilewright.kernels.checks import check_vector
from tilewright.kernels.formats import int8
from tilewright.nn.quantized_linear import QuantizedLinear, check_linear, common_options, dtype_name, parse_dtype


class _Int8Weight(QuantizedLinear):
    """``weight`` int8 [N, K] and ``weight_scale`` float32 [N]."""

    _integer_buffers = ("weight",)
    weight: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any):
        super().__init__(in_features, out_features, bias, **options)
        device = options.get("device")
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.float32, device=device))

    def _set_weight(self, weight: torch.Tensor, range_search: str, importance: torch.Tensor | None = None) -> None:
        self.weight, self.weight_scale = int8.quantize(weight, range_search, importance)

    def dequantize_weight(self) -> torch.Tensor:
        """The weight as float32 [out_features, in_features]."""
        return int8.dequantize(self.weight, self.weight_scale)


class Int8Linear(_Int8Weight):
    """int8 weights and activations (W8A8), activations quantised on the fly, one scale a row; see
    ``kernels.int8_linear``.

    ``channel_scale`` float32 [in_features] or None multiplies the input before it is quantised; the weight holds its
    inverse (SmoothQuant, Xiao et al. 2023), so that channels with outliers do not take the resolution of all others.
    """

    channel_scale: torch.Tensor | None
    _operands = ("weight", "weight_scale", "channel_scale")
    scheme_name = "w8a8"
    op_name = "int8_linear"

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, channel_scale: bool = False, **options: Any
    ):
        super().__init__(in_features, out_features, bias, **options)
        scale = torch.empty(in_features, dtype=torch.float32, device=options.get("device")) if channel_scale else None
        self.register_buffer("channel_scale", scale)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        range_search: str = "minmax",
        channel_scale: torch.Tensor | None = None,
        activation: str = "none",
    ) -> Int8Linear:
        """The quantised twin of ``linear``, sharing its bias. channel_scale: positive float [in_features]."""
        check_linear(linear)
        check_vector("Int8Linear", "channel_scale", channel_scale, linear.in_features)
        module = cls(**common_options(linear), channel_scale=channel_scale is not None, activation=activation)
        weight = linear.weight.detach()
        if channel_scale is not None:
            module.channel_scale = channel_scale.detach().to(weight.device, torch.float32)
            weight = weight.float() / module.channel_scale
        module._set_weight(weight, range_search)
        module.bias = linear.bias
        return module.train(linear.training)

    def dequantize_weight(self) -> torch.Tensor:
        """The weight as float32 [out_features, in_features], the channel scale taken back."""
        weight = super().dequantize_weight()
        return weight if self.channel_scale is None else weight * self.channel_scale

    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON."""
        return {**super().config(), "channel_scale": self.channel_scale is not None}

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x float [..., in_features], residual [..., out_features] -> x.dtype [..., out_features]."""
        self._check_input(x)
        call = None if residual is not None else self._prepared_call(x)
        if call is not None:
            return call(x)
        return torch.ops.tilewright.int8_linear(
            x, self.weight, self.weight_scale, self.bias, residual, self.activation, self.channel_scale
        )


class Int8WeightOnlyLinear(_Int8Weight):
    """int8 weights, float activations (W8A16); see ``kernels.int8_weight_only_linear``.

    ``compute_dtype``: what activations are rounded to for the product; None: nothing, they stay as they come.
    """

    _operands = ("weight", "weight_scale")
    scheme_name = "w8a16"
    op_name = "int8_weight_only_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        compute_dtype: torch.dtype | str | None = None,
        **options: Any,
    ):
        super().__init__(in_features, out_features, bias, **options)
        self.compute_dtype = parse_dtype(compute_dtype)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        range_search: str = "minmax",
        importance: torch.Tensor | None = None,
        compute_dtype: torch.dtype | str | None = "auto",
        activation: str = "none",
    ) -> Int8WeightOnlyLinear:
        """The quantised twin of ``linear``, sharing its bias.

        importance: weights of the squared errors for ``range_search="mse"``, float [in_features]. compute_dtype "auto":
        bfloat16 for a float32 layer, else None.
        """
        check_linear(linear)
        compute_dtype = resolve_compute_dtype(compute_dtype, linear.weight.dtype)
        module = cls(**common_options(linear), compute_dtype=compute_dtype, activation=activation)
        module._set_weight(linear.weight.detach(), range_search, importance)
        module.bias = linear.bias
        return module.train(linear.training)

    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON."""
        return {**super().config(), "compute_dtype": dtype_name(self.compute_dtype)}

    def _facts(self) -> dict[str, Any]:
        return {"compute_dtype": self.compute_dtype}

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "compute_dtype": self.compute_dtype, "k": self.in_features}

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x float [..., in_features], residual [..., out_features] -> x.dtype [..., out_features]."""
        self._check_input(x)
        call = None if residual is not None else self._prepared_call(x)
        if call is not None:
            return call(x)
        return torch.ops.tilewright.int8_weight_only_linear(
            x, self.weight, self.weight_scale, self.bias, residual, self.activation, self.compute_dtype
        )


def resolve_compute_dtype(compute_dtype: torch.dtype | str | None, weight_dtype: torch.dtype) -> torch.dtype | None:
    """Turn "auto" into a dtype: bfloat16 for float32 weights, where 16-bit products are what makes the layer fast,
    else None.
    """
    if compute_dtype == "auto":
        return torch.bfloat16 if weight_dtype == torch.float32 else None
    return parse_dtype(compute_dtype)
