"""Drop-in linear layers with int4 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tilewright.kernels.checks import check_vector
from tilewright.kernels.formats import int4
from tilewright.nn.int8_linear import resolve_compute_dtype
from tilewright.nn.quantized_linear import QuantizedLinear, check_linear, common_options, dtype_name, parse_dtype


class _Int4Weight(QuantizedLinear):
    """``weight_packed``, ``weight_scale`` and, if asymmetric, ``weight_zero``, as ``kernels.formats.int4`` defines
    them.
    """

    _integer_buffers = ("weight_packed", "weight_zero")
    weight_packed: torch.Tensor
    weight_zero: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int | None = 128,
        symmetric: bool = False,
        scale_dtype: torch.dtype | str | None = None,
        **options: Any,
    ):
        super().__init__(in_features, out_features, bias, **options)
        self.group_size = int4.resolve_group_size(in_features, group_size)
        self.symmetric = symmetric
        groups = int4.group_count(in_features, self.group_size)
        scale_dtype = parse_dtype(scale_dtype) or default_scale_dtype(self.dtype)
        device = options.get("device")

        def words(rows: int, columns: int) -> torch.Tensor:
            return torch.empty(rows, columns, dtype=torch.int32, device=device)

        self.register_buffer("weight_packed", words(out_features, int4.group_count(in_features, 8)))
        self.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=scale_dtype, device=device))
        self.register_buffer("weight_zero", None if symmetric else words(int4.group_count(out_features, 8), groups))

    def _set_weight(self, weight: torch.Tensor, range_search: str, importance: torch.Tensor | None = None) -> None:
        self.weight_packed, self.weight_scale, self.weight_zero = int4.quantize(
            weight, self.group_size, self.symmetric, range_search, self.weight_scale.dtype, importance
        )

    def dequantize_weight(self) -> torch.Tensor:
        """The weight as float32 [out_features, in_features]."""
        return int4.dequantize(
            self.weight_packed, self.weight_scale, self.weight_zero, self.group_size, self.in_features
        )

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight in ``dtype``, made anew at each access, for model code that reads ``layer.weight``."""
        return self.dequantize_weight().to(self.dtype)

    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON."""
        return {
            **super().config(),
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_dtype": dtype_name(self.weight_scale.dtype),
        }

    def extra_repr(self) -> str:
        """Sizes, then the format."""
        return f"{super().extra_repr()}, group_size={self.group_size}, symmetric={self.symmetric}"

    def _facts(self) -> dict[str, Any]:
        return {
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_dtype": self.weight_scale.dtype,
        }


class Int4Linear(_Int4Weight):
    """int4 weights, float activations (W4A16); see ``kernels.int4_linear``.

    ``compute_dtype``: what activations and dequantised weights are rounded to for the product; None: the input's dtype.
    """

    _operands = ("weight_packed", "weight_scale", "weight_zero")
    scheme_name = "w4a16"
    op_name = "int4_linear"

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
        group_size: int | None = 128,
        symmetric: bool = False,
        range_search: str = "mse",
        importance: torch.Tensor | None = None,
        scale_dtype: torch.dtype | str | None = None,
        compute_dtype: torch.dtype | str | None = "auto",
        activation: str = "none",
    ) -> Int4Linear:
        """The quantised twin of ``linear``, sharing its bias.

        group_size: columns that share a scale; None or -1: the whole row. importance: weights of the squared errors for
        ``range_search="mse"``, float [in_features]. scale_dtype: by default the layer's dtype if it has 16 bits, else
        bfloat16. compute_dtype "auto": bfloat16 for a float32 layer, else None.
        """
        check_linear(linear)
        module = cls(
            **common_options(linear),
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
            compute_dtype=resolve_compute_dtype(compute_dtype, linear.weight.dtype),
            activation=activation,
        )
        module._set_weight(linear.weight.detach(), range_search, importance)
        module.bias = linear.bias
        return module.train(linear.training)

    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON."""
        return {**super().config(), "compute_dtype": dtype_name(self.compute_dtype)}

    def _facts(self) -> dict[str, Any]:
        return {**super()._facts(), "compute_dtype": self.compute_dtype}

    def _arguments(self) -> dict[str, Any]:
        options = {"group_size": self.group_size, "compute_dtype": self.compute_dtype, "k": self.in_features}
        return {**super()._arguments(), **options}

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x float [..., in_features], residual [..., out_features] -> x.dtype [..., out_features]."""
        self._check_input(x)
        call = None if residual is not None else self._prepared_call(x)
        if call is not None:
            return call(x)
        return torch.ops.tilewright.int4_linear(
            x,
            self.weight_packed,
            self.weight_scale,
            self.weight_zero,
            self.bias,
            residual,
            group_size=self.group_size,
            activation=self.activation,
            compute_dtype=self.compute_dtype,
        )


class Int8ActInt4WeightLinear(_Int4Weight):
    """int4 weights, activations quantised to int8 on the fly (W4A8); see ``kernels.int4_int8_linear``.

    ``channel_scale`` is that of ``Int8Linear``.
    """

    channel_scale: torch.Tensor | None
    _operands = ("weight_packed", "weight_scale", "weight_zero", "channel_scale")
    scheme_name = "w4a8"
    op_name = "int4_int8_linear"

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
        group_size: int | None = 128,
        symmetric: bool = False,
        range_search: str = "mse",
        scale_dtype: torch.dtype | str | None = None,
        channel_scale: torch.Tensor | None = None,
        activation: str = "none",
    ) -> Int8ActInt4WeightLinear:
        """The quantised twin of ``linear``, sharing its bias; options as for ``Int4Linear`` and ``Int8Linear``."""
        check_linear(linear)
        check_vector("Int8ActInt4WeightLinear", "channel_scale", channel_scale, linear.in_features)
        module = cls(
            **common_options(linear),
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
            channel_scale=channel_scale is not None,
            activation=activation,
        )
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
        return torch.ops.tilewright.int4_int8_linear(
            x,
            self.weight_packed,
            self.weight_scale,
            self.weight_zero,
            self.bias,
            residual,
            self.channel_scale,
            group_size=self.group_size,
            activation=self.activation,
        )

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "group_size": self.group_size, "k": self.in_features}


def default_scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """16-bit layers keep their dtype; others get bfloat16, whose range no weight exceeds."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
