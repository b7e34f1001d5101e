"""A drop-in convolution in float, with batch-norm folded in and activation and residual in its epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tilewright.kernels.activation import apply_activation
from tilewright.nn.conv_layer import ConvLayer, Padding, check_conv, common_options, folded


class FloatConv(ConvLayer):
    """What convolutions share that are multiplied in the dtype of their input.

    ``allow_tf32``: let float32 products be taken in TF32.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        allow_tf32: bool = False,
        **options: Any,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **options)
        self.allow_tf32 = allow_tf32

    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON."""
        return {**super().config(), "allow_tf32": self.allow_tf32}

    def _product(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        padding: Padding,
        activation: str,
        negative_slope: float,
    ) -> torch.Tensor:
        """The operator, with a residual of the shape of its result."""
        raise NotImplementedError(f"{type(self).__name__}._product")

    def _take_bias(self, conv: nn.Conv2d | nn.Conv1d, bias: torch.Tensor | None) -> None:
        """``bias``, what ``folded`` made of ``conv``'s, as a parameter that trains if the convolution does."""
        if bias is not None:
            # A bias that is float32 already would be the very tensor of the original, where training would change it.
            own = bias.clone() if conv.bias is not None and bias.data_ptr() == conv.bias.data_ptr() else bias
            self.bias = nn.Parameter(own, requires_grad=conv.weight.requires_grad)

    def _convolve(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        activation: str,
        negative_slope: float,
        padding: Padding | None,
        out_scale: float | None,
        x_nonnegative: bool,
    ) -> torch.Tensor:
        pads = padding or self._padding or self.same_padding_for(x.shape[2], x.shape[3])
        if residual is None or self._residual_fits(x, residual, pads):
            return self._product(x, residual, pads, activation, negative_slope)
        y = self._product(x, None, pads, "none", negative_slope)
        return apply_activation(y + residual, activation, negative_slope=negative_slope)


class ConvBnAct2d(FloatConv):
    """y = activation(conv(x) + bias + residual) in one kernel; see ``kernels.conv2d``.

    ``weight`` is a parameter, OHWI, in the layer's dtype.
    """

    scheme_name = "fuse"
    op_name = "conv2d_fused"

    def __init__(self, in_channels: int, out_channels: int, *sizes: Any, **options: Any):
        super().__init__(in_channels, out_channels, *sizes, **options)
        shape = (out_channels, *self._window, in_channels // self.groups)
        self.weight = nn.Parameter(torch.empty(shape, device=options.get("device"), dtype=self.dtype))

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d | nn.Conv1d,
        norm: nn.Module | None = None,
        *,
        activation: str = "none",
        negative_slope: float = 0.01,
        allow_tf32: bool = False,
    ) -> ConvBnAct2d:
        """The fused twin of ``conv``, then ``norm`` (a batch-norm in eval mode), then the activation."""
        check_conv(conv)
        weight, bias = folded(conv, norm)
        module = cls(
            **common_options(conv, bias is not None),
            activation=activation,
            negative_slope=negative_slope,
            allow_tf32=allow_tf32,
        )
        module.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
        module._take_bias(conv, bias)
        return module.train(conv.training)

    def dequantize_weight(self) -> torch.Tensor:
        """The weight as float32, OHWI."""
        return self.weight.detach().float()

    def _product(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        padding: Padding,
        activation: str,
        negative_slope: float,
    ) -> torch.Tensor:
        window = (self._stride, padding, self._dilation, self.groups)
        return torch.ops.tilewright.conv2d_fused(
            x, self.weight, self.bias, residual, *window, activation, negative_slope, self.allow_tf32
        )
