"""Drop-in linear layers with 2:4 weights: of every four consecutive input columns two are kept."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewright.kernels.checks import INPUT_DTYPES, check_vector
from tilewright.kernels.formats import int4, int8, sparse24
from tilewright.nn.int4_linear import default_scale_dtype
from tilewright.nn.int8_linear import resolve_compute_dtype
from tilewright.nn.quantized_linear import QuantizedLinear, check_linear, common_options, dtype_name, parse_dtype
from tilewright.nn.sparse24_places import Sparse24Places


class _Sparse24Weight(Sparse24Places, QuantizedLinear):
    """``weight_values`` and ``weight_meta``, as ``kernels.formats.sparse24`` defines them.

    ``weight_values`` keep their dtype under ``.to(dtype)``, as scales do: casting there and back loses nothing.
    """

    _integer_buffers: ClassVar[tuple[str, ...]] = ("weight_values", "weight_meta")
    weight_values: torch.Tensor

    def _columns(self) -> int:
        return self.in_features

    def _make_buffers(self, values: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        meta = sparse24.meta_count(self.in_features)
        self.register_buffer("weight_values", torch.empty(self.out_features, values, dtype=dtype, device=device))
        self.register_buffer("weight_meta", torch.empty(self.out_features, meta, dtype=torch.uint8, device=device))

    def _keep(self, weight: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Set the places that are kept of ``weight`` [N, K]; returns the values there [N, 2 G]."""
        if mask is None and sparse24.why_not_24(weight):
            mask = sparse24.best_mask(weight.abs())
        values, self.weight_meta = sparse24.pack(weight, mask)
        return values

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight in ``dtype``, made anew at each access, for model code that reads ``layer.weight``."""
        return self.dequantize_weight().to(self.dtype)

    def mask(self) -> torch.Tensor:
        """What is kept, bool [out_features, in_features]."""
        return sparse24.mask_of(self.weight_meta, self.in_features)


class Sparse24Linear(_Sparse24Weight):
    """2:4 weights with float values; see ``kernels.sparse24_linear``.

    ``compute_dtype``: what activations and weights are rounded to for the product; None: the input's dtype.
    """

    _integer_buffers = ("weight_meta",)
    _scale_buffers = ("weight_values",)
    _operands = ("weight_values", "weight_meta")
    scheme_name = "sparse24-w16a16"
    op_name = "sparse24_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        values_dtype: torch.dtype | str | None = None,
        compute_dtype: torch.dtype | str | None = None,
        **options: Any,
    ):
        super().__init__(in_features, out_features, bias, **options)
        values_dtype = parse_dtype(values_dtype) or self.dtype
        if values_dtype not in INPUT_DTYPES:
            raise ValueError(f"values_dtype must have 16, 32 or 64 bits, not {values_dtype}")
        self.compute_dtype = parse_dtype(compute_dtype)
        self._make_buffers(sparse24.kept_count(in_features), values_dtype, options.get("device"))

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        mask: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        values_dtype: torch.dtype | str | None = "auto",
        compute_dtype: torch.dtype | str | None = "auto",
        activation: str = "none",
    ) -> Sparse24Linear:
        """The pruned twin of ``linear``, sharing its bias.

        mask: bool [out_features, in_features], what is kept. Without one a weight that is 2:4 stays as it is, and of
        any other the larger two of every four are kept. weight: what to keep values of instead of ``linear.weight``,
        for pruning that changes those that stay. values_dtype, compute_dtype "auto": bfloat16 for a float32 layer,
        else the layer's dtype and that of the input.
        """
        check_linear(linear)
        dense = (linear.weight if weight is None else weight).detach()
        int8.check_weight(dense)
        module = cls(
            **common_options(linear),
            values_dtype=resolve_compute_dtype(values_dtype, linear.weight.dtype),
            compute_dtype=resolve_compute_dtype(compute_dtype, linear.weight.dtype),
            activation=activation,
        )
        module.weight_values = module._keep(dense, mask).to(module.weight_values.dtype)
        if not torch.isfinite(module.weight_values).all():
            raise ValueError(f"the weight overflows {module.weight_values.dtype}")
        module.bias = linear.bias
        return module.train(linear.training)

    def dequantize_weight(self) -> torch.Tensor:
        """The weight as float32 [out_features, in_features]."""
        return sparse24.unpack(self.weight_values.float(), self.weight_meta, self.in_features)

    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON."""
        return {
            **super().config(),
            "values_dtype": dtype_name(self.weight_values.dtype),
            "compute_dtype": dtype_name(self.compute_dtype),
        }

    def extra_repr(self) -> str:
        """Sizes, then the format."""
        return f"{super().extra_repr()}, values={dtype_name(self.weight_values.dtype)}"

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
        return torch.ops.tilewright.sparse24_linear(
            x, self.weight_values, self.weight_meta, self.bias, residual, self.activation, self.compute_dtype
        )


class Sparse24Int8Linear(_Sparse24Weight):
    """2:4 weights with int8 values, activations quantised to int8 on the fly, one scale a row.

    ``channel_scale`` is that of ``Int8Linear``.
    """

    channel_scale: torch.Tensor | None
    _operands = ("weight_values", "weight_meta", "weight_scale", "channel_scale")
    scheme_name = "sparse24-w8a8"
    op_name = "sparse24_int8_linear"

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, channel_scale: bool = False, **options: Any
    ):
        super().__init__(in_features, out_features, bias, **options)
        device = options.get("device")
        self._make_buffers(sparse24.kept_count(in_features), torch.int8, device)
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.float32, device=device))
        scale = torch.empty(in_features, dtype=torch.float32, device=device) if channel_scale else None
        self.register_buffer("channel_scale", scale)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        mask: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        range_search: str = "minmax",
        channel_scale: torch.Tensor | None = None,
        activation: str = "none",
    ) -> Sparse24Int8Linear:
        """The pruned and quantised twin of ``linear``, sharing its bias; options as for ``Sparse24Linear`` and
        ``Int8Linear``.
        """
        check_linear(linear)
        check_vector("Sparse24Int8Linear", "channel_scale", channel_scale, linear.in_features)
        module = cls(**common_options(linear), channel_scale=channel_scale is not None, activation=activation)
        dense = (linear.weight if weight is None else weight).detach()
        int8.check_weight(dense)
        if channel_scale is not None:
            module.channel_scale = channel_scale.detach().to(dense.device, torch.float32)
            dense = dense.float() / module.channel_scale
        module.weight_values, module.weight_scale = int8.quantize(module._keep(dense, mask), range_search)
        module.bias = linear.bias
        return module.train(linear.training)

    def dequantize_weight(self) -> torch.Tensor:
        """The weight as float32 [out_features, in_features], the channel scale taken back."""
        values = int8.dequantize(self.weight_values, self.weight_scale)
        weight = sparse24.unpack(values, self.weight_meta, self.in_features)
        return weight if self.channel_scale is None else weight * self.channel_scale

    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON."""
        return {**super().config(), "channel_scale": self.channel_scale is not None}

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "k": self.in_features}

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x float [..., in_features], residual [..., out_features] -> x.dtype [..., out_features]."""
        self._check_input(x)
        call = None if residual is not None else self._prepared_call(x)
        if call is not None:
            return call(x)
        return torch.ops.tilewright.sparse24_int8_linear(
            x,
            self.weight_values,
            self.weight_meta,
            self.weight_scale,
            self.bias,
            residual,
            self.activation,
            self.channel_scale,
        )


class Sparse24Int4Linear(_Sparse24Weight):
    """2:4 weights with int4 values and a scale for each group of columns, float activations.

    ``compute_dtype`` is that of ``Int4Linear``.
    """

    _integer_buffers = ("weight_values", "weight_meta", "weight_zero")
    weight_zero: torch.Tensor | None
    _operands = ("weight_values", "weight_meta", "weight_scale", "weight_zero")
    scheme_name = "sparse24-w4a16"
    op_name = "sparse24_int4_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int | None = 128,
        symmetric: bool = True,
        scale_dtype: torch.dtype | str | None = None,
        compute_dtype: torch.dtype | str | None = None,
        **options: Any,
    ):
        super().__init__(in_features, out_features, bias, **options)
        self.group_size = int4.resolve_group_size(in_features, group_size)
        sparse24.kept_group_size(in_features, self.group_size)
        self.symmetric = symmetric
        self.compute_dtype = parse_dtype(compute_dtype)
        groups = int4.group_count(in_features, self.group_size)
        scale_dtype = parse_dtype(scale_dtype) or default_scale_dtype(self.dtype)
        device = options.get("device")
        self._make_buffers(int4.group_count(sparse24.kept_count(in_features), 8), torch.int32, device)
        self.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=scale_dtype, device=device))
        zero = torch.empty(int4.group_count(out_features, 8), groups, dtype=torch.int32, device=device)
        self.register_buffer("weight_zero", None if symmetric else zero)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        mask: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        group_size: int | None = 128,
        symmetric: bool = True,
        range_search: str = "mse",
        scale_dtype: torch.dtype | str | None = None,
        compute_dtype: torch.dtype | str | None = "auto",
        activation: str = "none",
    ) -> Sparse24Int4Linear:
        """The pruned and quantised twin of ``linear``, sharing its bias; options as for ``Sparse24Linear`` and
        ``Int4Linear``. group_size: columns that share a scale, a multiple of 4; None or -1: the whole row.
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
        dense = (linear.weight if weight is None else weight).detach()
        int8.check_weight(dense)
        module.weight_values, module.weight_scale, module.weight_zero = int4.quantize(
            module._keep(dense, mask),
            sparse24.kept_group_size(linear.in_features, module.group_size),
            symmetric,
            range_search,
            module.weight_scale.dtype,
        )
        module.bias = linear.bias
        return module.train(linear.training)

    def dequantize_weight(self) -> torch.Tensor:
        """The weight as float32 [out_features, in_features]."""
        kept, size = sparse24.kept_count(self.in_features), self.group_size
        values = int4.dequantize(
            self.weight_values,
            self.weight_scale,
            self.weight_zero,
            sparse24.kept_group_size(self.in_features, size),
            kept,
        )
        return sparse24.unpack(values, self.weight_meta, self.in_features)

    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON."""
        return {
            **super().config(),
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_dtype": dtype_name(self.weight_scale.dtype),
            "compute_dtype": dtype_name(self.compute_dtype),
        }

    def extra_repr(self) -> str:
        """Sizes, then the format."""
        return f"{super().extra_repr()}, group_size={self.group_size}, symmetric={self.symmetric}"

    def _facts(self) -> dict[str, Any]:
        return {
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_dtype": self.weight_scale.dtype,
            "compute_dtype": self.compute_dtype,
        }

    def _arguments(self) -> dict[str, Any]:
        options = {"group_size": self.group_size, "compute_dtype": self.compute_dtype, "k": self.in_features}
        return {**super()._arguments(), **options}

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x float [..., in_features], residual [..., out_features] -> x.dtype [..., out_features]."""
        self._check_input(x)
        call = None if residual is not None else self._prepared_call(x)
        if call is not None:
            return call(x)
        return torch.ops.tilewright.sparse24_int4_linear(
            x,
            self.weight_values,
            self.weight_meta,
            self.weight_scale,
            self.weight_zero,
            self.bias,
            residual,
            group_size=self.group_size,
            activation=self.activation,
            compute_dtype=self.compute_dtype,
        )
