"""A drop-in convolution in float whose weight is 2:4 along the input channels."""

from __future__ import annotations

import math
from typing import Any

import torch

from tilewright.kernels.formats.sparse24 import Sparse24
from tilewright.kernels.formats.weight import Float
from tilewright.nn.conv import FloatConv
from tilewright.nn.quantized_linear import dtype_name, parse_dtype
from tilewright.nn.sparse24_places import Sparse24Places


class Sparse24ConvBnAct2d(Sparse24Places, FloatConv):
    """y = activation(conv(x) + bias + residual); see ``kernels.sparse24_conv2d``.

    ``weight_values`` and ``weight_meta`` have a row for each output channel and place in the window. Values keep their
    dtype under ``.to(dtype)``; the product is taken in the dtype of the input. ``from_float`` leaves a weight that is
    2:4 as it is; of any other it keeps the larger two of every four input channels.
    """

    scheme_name = "sparse24-conv"
    op_name = "sparse24_conv2d_fused"
    base_format = Sparse24(Float())
    weight_values: torch.Tensor

    def __init__(self, *sizes: Any, values_dtype: torch.dtype | str | None = None, **options: Any):
        super().__init__(*sizes, **options)
        rows = self.out_channels * math.prod(self._window)
        stored = Sparse24(Float(parse_dtype(values_dtype) or self.dtype))
        for name, spec in stored.operands(rows, self._columns()).items():
            self.register_buffer(name, spec.empty(options.get("device")))

    def _take_weight(self, weight: torch.Tensor, trained: bool) -> None:
        rows = weight.reshape(-1, weight.shape[-1])
        for name, operand in Sparse24(Float(rows.dtype)).quantize(rows).items():
            setattr(self, name, operand)

    def dequantize_weight(self) -> torch.Tensor:
        """The weight as float32, OHWI."""
        return self._matrix(self._held_weight()).reshape(self.weight_shape)

    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON."""
        values = dtype_name(self.weight_values.dtype)
        return {**super().config(), "values_dtype": values}

    def _product(self, x: torch.Tensor, residual: torch.Tensor | None, *rest: Any) -> torch.Tensor:
        held = (self.weight_values, self.weight_meta)
        return torch.ops.tilewright.sparse24_conv2d_fused(x, *held, self._bias, residual, self._window, *rest)
