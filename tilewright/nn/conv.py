"""A drop-in convolution in float, with batch-norm folded in and activation and residual in its epilogue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from tilewright.kernels.activation import apply_activation
from tilewright.nn.conv_layer import ConvLayer, Epilogue, check_conv, common_options, folded

Layer = TypeVar("Layer", bound="FloatConv")


class FloatConv(ConvLayer):
    """What convolutions share that are multiplied in the dtype of their input.

    ``allow_tf32``: let float32 products be taken in TF32.
    """

    def __init__(self, *sizes: Any, allow_tf32: bool = False, **options: Any):
        super().__init__(*sizes, **options)
        self.allow_tf32 = allow_tf32

    @classmethod
    def from_float(
        cls: type[Layer],
        conv: nn.Conv2d | nn.Conv1d,
        norm: nn.Module | None = None,
        *,
        activation: str = "none",
        negative_slope: float = 0.01,
        allow_tf32: bool = False,
    ) -> Layer:
        """The fused twin of ``conv``, then ``norm`` (a batch-norm in eval mode), then the activation."""
        check_conv(conv)
        weight, bias = folded(conv, norm)
        if weight.data_ptr() == conv.weight.data_ptr():  # of 1 x 1: training would change the original's
            weight = weight.clone()
        end: dict[str, Any] = {"activation": activation, "negative_slope": negative_slope, "allow_tf32": allow_tf32}
        module = cls(**common_options(conv, bias is not None), **end)
        trained = conv.weight.requires_grad
        module._take_weight(weight, trained)
        if bias is not None:
            # A bias that is float32 already would be the very tensor of the original, where training would change it.
            own = bias.clone() if conv.bias is not None and bias.data_ptr() == conv.bias.data_ptr() else bias
            module.register_parameter("bias", nn.Parameter(own, requires_grad=trained))
        return module.train(conv.training)

    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON."""
        return {**super().config(), "allow_tf32": self.allow_tf32}

    # ---- what subclasses provide
    def _take_weight(self, weight: torch.Tensor, trained: bool) -> None:
        """Hold ``weight``, OHWI. trained: whether it has a gradient in the layer that this one stands for."""
        raise NotImplementedError(f"{type(self).__name__}._take_weight")

    def _product(self, x: torch.Tensor, residual: torch.Tensor | None, *rest: Any) -> torch.Tensor:
        """The operator, with a residual of the shape of its result. rest: its arguments from the stride on."""
        raise NotImplementedError(f"{type(self).__name__}._product")

    # ---- internal
    def _convolve(self, x: torch.Tensor, residual: torch.Tensor | None, end: Epilogue) -> torch.Tensor:
        activation, negative_slope, padding, *_ = end
        pads = padding or self._padding or self.same_padding_for(x.shape[2], x.shape[3])
        window = (self._stride, pads, self._dilation, self.groups)
        if residual is None or self._residual_fits(x, residual, pads):
            return self._product(x, residual, *window, activation, negative_slope, self.allow_tf32)
        y = self._product(x, None, *window, "none", negative_slope, self.allow_tf32)
        return apply_activation(y + residual, activation, negative_slope=negative_slope)


class ConvBnAct2d(FloatConv):
    """y = activation(conv(x) + bias + residual) in one kernel; see ``kernels.conv2d``.

    ``weight_ohwi`` is a parameter in the layer's dtype; ``weight`` shows it as ``nn.Conv2d`` has it, with its gradient.
    """

    scheme_name = "fuse"
    op_name = "conv2d_fused"
    _before: ClassVar[Mapping[str, str]] = {"weight": "weight_ohwi"}
    weight_ohwi: nn.Parameter

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__(*sizes, **options)
        weight = torch.empty(self.weight_shape, device=options.get("device"), dtype=self.dtype)
        self.weight_ohwi = nn.Parameter(weight)

    def dequantize_weight(self) -> torch.Tensor:
        """The weight as float32, OHWI."""
        return self.weight_ohwi.detach().float()

    def _take_weight(self, weight: torch.Tensor, trained: bool) -> None:
        self.weight_ohwi = nn.Parameter(weight, requires_grad=trained)

    def _product(self, x: torch.Tensor, residual: torch.Tensor | None, *rest: Any) -> torch.Tensor:
        return torch.ops.tilewright.conv2d_fused(x, self.weight_ohwi, self._bias, residual, *rest)

    # ---- the weight as that of nn.Conv2d
    def _held_weight(self) -> dict[str, torch.Tensor]:
        return {"weight_ohwi": self.weight_ohwi}

    def _weight_dtype(self, held: Mapping[str, torch.Tensor]) -> torch.dtype:
        return held["weight_ohwi"].dtype

    def _decoded(self, held: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._weight_of(held["weight_ohwi"])

    def _encoded(self, weight: torch.Tensor, held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ohwi = self._matrix_of(weight.detach()).reshape(self.weight_shape).to(held["weight_ohwi"].dtype)
        trained = held["weight_ohwi"].requires_grad
        return {"weight_ohwi": nn.Parameter(ohwi.clone(memory_format=torch.contiguous_format), trained)}
