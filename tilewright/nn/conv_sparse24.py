"""A drop-in convolution in float whose weight is 2:4 along the input channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tilewright.kernels.activation import apply_activation
from tilewright.kernels.formats import sparse24
from tilewright.nn.conv_layer import ConvLayer, Padding, check_conv, common_options, folded
from tilewright.nn.quantized_linear import dtype_name, parse_dtype


class Sparse24ConvBnAct2d(ConvLayer):
    """y = activation(conv(x) + bias + residual); see ``kernels.sparse24_conv2d``.

    ``weight_values`` and ``weight_meta`` have a row for each output channel and place in the window. Values keep their
    dtype under ``.to(dtype)``; the product is taken in the dtype of the input.
    """

    scheme_name = "sparse24-conv"
    op_name = "sparse24_conv2d_fused"
    _integer_buffers = ("weight_meta",)
    _kept_in_dtype = ("bias", "weight_values")
    weight_values: torch.Tensor
    weight_meta: torch.Tensor

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
        values_dtype: torch.dtype | str | None = None,
        **options: Any,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **options)
        self.allow_tf32 = allow_tf32
        device, channels = options.get("device"), in_channels // groups
        rows = out_channels * math.prod(self._window)
        values = torch.empty(
            rows, sparse24.kept_count(channels), dtype=parse_dtype(values_dtype) or self.dtype, device=device
        )
        self.register_buffer("weight_values", values)
        meta = torch.empty(rows, sparse24.meta_count(channels), dtype=torch.uint8, device=device)
        self.register_buffer("weight_meta", meta)

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
        mask = sparse24.best_mask(rows.abs()) if sparse24.why_not_24(rows) else None
        module.weight_values, module.weight_meta = sparse24.pack(rows, mask)
        if bias is not None:
            own = bias.clone() if conv.bias is not None and bias.data_ptr() == conv.bias.data_ptr() else bias
            module.bias = nn.Parameter(own, requires_grad=conv.weight.requires_grad)
        return module.train(conv.training)

    def dequantize_weight(self) -> torch.Tensor:
        """The weight as float32, OHWI."""
        rows = sparse24.unpack(self.weight_values.float(), self.weight_meta, self.in_channels // self.groups)
        return rows.reshape(self.weight_shape)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The dense weight, OHWI in ``dtype``, made anew at each access, for model code that reads ``layer.weight``."""
        return self.dequantize_weight().to(self.dtype)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight_meta.device

    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON."""
        values = dtype_name(self.weight_values.dtype)
        return {**super().config(), "allow_tf32": self.allow_tf32, "values_dtype": values}

    def why_bad_buffer(self, name: str, value: torch.Tensor) -> str | None:
        """See ``ConvLayer``: places must ascend."""
        if name != "weight_meta" or value.is_meta or value.shape != self.weight_meta.shape:
            return None
        return sparse24.why_bad_meta(value, self.in_channels // self.groups)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        meta = state_dict.get(prefix + "weight_meta")
        if meta is not None and meta.dtype == torch.uint8 and (reason := self.why_bad_buffer("weight_meta", meta)):
            error_msgs.append(f"{prefix}weight_meta is no 2:4 pattern: {reason}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

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
        apart = residual is not None and not self._residual_fits(x, residual, pads)
        y = torch.ops.tilewright.sparse24_conv2d_fused(
            x,
            self.weight_values,
            self.weight_meta,
            self.bias,
            None if apart else residual,
            self._window,
            self._stride,
            pads,
            self._dilation,
            self.groups,
            "none" if apart else activation,
            negative_slope,
            self.allow_tf32,
        )
        return apply_activation(y + residual, activation, negative_slope=negative_slope) if apart else y
