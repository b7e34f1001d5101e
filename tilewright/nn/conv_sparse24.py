"""A drop-in convolution in float whose weight is 2:4 along the input channels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tilewright.kernels.formats.sparse24 import Sparse24
from tilewright.kernels.formats.weight import Float
from tilewright.nn.conv import FloatConv
from tilewright.nn.conv_layer import Padding, check_conv, common_options, folded
from tilewright.nn.quantized_linear import dtype_name, parse_dtype
from tilewright.nn.sparse24_places import Sparse24Places


class Sparse24ConvBnAct2d(Sparse24Places, FloatConv):
    """y = activation(conv(x) + bias + residual); see ``kernels.sparse24_conv2d``.

    ``weight_values`` and ``weight_meta`` have a row for each output channel and place in the window. Values keep their
    dtype under ``.to(dtype)``; the product is taken in the dtype of the input.
    """

    scheme_name = "sparse24-conv"
    op_name = "sparse24_conv2d_fused"
    _kept_in_dtype = ("bias", "weight_values")
    weight_values: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *sizes: Any,
        values_dtype: torch.dtype | str | None = None,
        **options: Any,
    ):
        super().__init__(in_channels, out_channels, *sizes, **options)
        device, channels = options.get("device"), self._columns()
        rows = out_channels * math.prod(self._window)
        stored = Sparse24(Float(parse_dtype(values_dtype) or self.dtype))
        for name, spec in stored.operands(rows, channels).items():
            self.register_buffer(name, spec.empty(device))

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d | nn.Conv1d,
        norm: nn.Module | None = None,
        *,
        activation: str = "none",
        negative_slope: float = 0.01,
        allow_tf32: bool = False,
    ) -> Sparse24ConvBnAct2d:
        """The fused, pruned twin of ``conv``, then ``norm`` (a batch-norm in eval mode), then the activation.

        A weight that is 2:4 stays as it is; of any other the larger two of every four input channels are kept.
        """
        check_conv(conv)
        weight, bias = folded(conv, norm)
        module = cls(
            **common_options(conv, bias is not None),
            activation=activation,
            negative_slope=negative_slope,
            allow_tf32=allow_tf32,
        )
        rows = weight.reshape(-1, weight.shape[-1])
        for name, operand in Sparse24(Float(rows.dtype)).quantize(rows).items():
            setattr(module, name, operand)
        module._take_bias(conv, bias)
        return module.train(conv.training)

    def dequantize_weight(self) -> torch.Tensor:
        """The weight as float32, OHWI."""
        rows = Sparse24(Float(self.weight_values.dtype)).dequantize(self._buffers, self._columns())
        return rows.reshape(self.weight_shape)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The dense weight, OHWI in ``dtype``, made anew at each access, for model code that reads ``layer.weight``."""
        return self.dequantize_weight().to(self.dtype)

    def _columns(self) -> int:
        return self.in_channels // self.groups

    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON."""
        values = dtype_name(self.weight_values.dtype)
        return {**super().config(), "values_dtype": values}

    def _product(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        padding: Padding,
        activation: str,
        negative_slope: float,
    ) -> torch.Tensor:
        weight = (self.weight_values, self.weight_meta)
        window = (self._window, self._stride, padding, self._dilation, self.groups)
        return torch.ops.tilewright.sparse24_conv2d_fused(
            x, *weight, self.bias, residual, *window, activation, negative_slope, self.allow_tf32
        )
