"""Operators ``tilewright::*`` as PyTorch's own, for programs that run where Tilewright is not.

Each is its definition, but for products: int8 ones are taken by ``aten::_int_mm``, exact in int32, and int8
convolutions in float32, whose sums of integers are exact below 2^24. Nothing works in place, as export demands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.deploy.onnx.symbols import overload
from tilewright.kernels.activation import apply_activation
from tilewright.kernels.conv2d import reference as conv_reference
from tilewright.kernels.conv_geometry import check_geometry, oihw, pad_image
from tilewright.kernels.dispatch.card import REFERENCE, cards
from tilewright.kernels.dispatch.router import implementations
from tilewright.kernels.epilogue import finish
from tilewright.kernels.formats import int4
from tilewright.kernels.int8_conv2d import reference as int8_conv_reference
from tilewright.kernels.norm_quantize import reference as norm_reference
from tilewright.kernels.quantize.reference import quantize_per_row

Tensor = torch.Tensor


def _integer_product(q: Tensor, weight: Tensor) -> Tensor:
    """int8 [..., K] by int8 [N, K] -> int32 [..., N]."""
    rows = q.reshape(-1, q.shape[-1])
    return torch._int_mm(rows, weight.t()).reshape(*q.shape[:-1], weight.shape[0])


def int8_linear_quantized(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See ``kernels.int8_linear.reference``."""
    y = _integer_product(x, weight).float() * x_scale.unsqueeze(-1) * weight_scale
    return finish(y, bias, residual, activation, out_dtype or torch.float32)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    channel_scale: Tensor | None = None,
) -> Tensor:
    """See ``kernels.int8_linear.reference``."""
    q, scale = quantize_per_row(x, channel_scale)
    return int8_linear_quantized(q, scale, weight, weight_scale, bias, residual, activation, x.dtype)


def int8_weight_only_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """See ``kernels.int8_weight_only_linear.reference``."""
    narrow = compute_dtype or x.dtype
    y = F.linear(x.to(narrow), (weight.float() * weight_scale.unsqueeze(-1)).to(narrow))
    return finish(y.float(), bias, residual, activation, x.dtype)


def _int4_weight(
    packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, k: int, dtype: torch.dtype
) -> Tensor:
    wide = scale.float().repeat_interleave(group_size, dim=1)[:, :k]
    return (int4.unpack_centred(packed, zero, group_size, k).float() * wide).to(dtype)


def int4_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    group_size: int,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """See ``kernels.int4_linear.reference``."""
    narrow = compute_dtype or x.dtype
    weight = _int4_weight(weight_packed, weight_scale, weight_zero, group_size, x.shape[-1], narrow)
    return finish(F.linear(x.to(narrow), weight).float(), bias, residual, activation, x.dtype)


def int4_int8_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    channel_scale: Tensor | None = None,
    *,
    group_size: int,
    activation: str = "none",
) -> Tensor:
    """See ``kernels.int4_int8_linear.reference``."""
    q, scale = quantize_per_row(x, channel_scale)
    weight = _int4_weight(weight_packed, weight_scale, weight_zero, group_size, x.shape[-1], torch.float32)
    y = F.linear(q.float(), weight) * scale.unsqueeze(-1)
    return finish(y, bias, residual, activation, x.dtype)


def int8_conv2d_fused(
    x: Tensor,
    x_scale: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    negative_slope: float = 0.01,
    out_scale: float | None = None,
    out_dtype: torch.dtype | None = None,
    x_nonnegative: bool = False,
) -> Tensor:
    """See ``kernels.int8_conv2d.reference``."""
    check_geometry("int8_conv2d_fused", x, weight, stride, padding, dilation, groups)
    image, symmetric = pad_image(int8_conv_reference.integers(x, torch.float32), padding)
    total = F.conv2d(image, oihw(weight.float()), None, tuple(stride), symmetric, tuple(dilation), groups)
    y = total * (weight_scale * x_scale).view(-1, 1, 1)
    if bias is not None:
        y = y + bias.float().view(-1, 1, 1)
    if residual is not None:
        y = y + int8_conv_reference.integers(residual, torch.float32) * residual_scale
    y = apply_activation(y, activation, negative_slope=negative_slope)
    if out_scale is not None:
        return quantize_per_tensor(y, out_scale, out_dtype)
    return y.to(out_dtype or torch.float32).contiguous(memory_format=torch.channels_last)


def quantize_per_tensor(x: Tensor, scale: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """See ``kernels.int8_conv2d.reference``."""
    return int8_conv_reference.quantize_per_tensor(x, scale, out_dtype)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """For ``ExportedProgram.run_decompositions``: every operator of Tilewright, and no other."""
    functions: dict[str, Callable[..., Any]] = {
        "quantize_per_row": quantize_per_row,
        "rms_norm_quantize": norm_reference.rms_norm_quantize,
        "layer_norm_quantize": norm_reference.layer_norm_quantize,
        "int8_linear": int8_linear,
        "int8_linear_quantized": int8_linear_quantized,
        "int8_weight_only_linear": int8_weight_only_linear,
        "int4_linear": int4_linear,
        "int4_int8_linear": int4_int8_linear,
        "conv2d_fused": conv_reference.conv2d_fused,
        "quantize_per_tensor": quantize_per_tensor,
        "int8_conv2d_fused": int8_conv2d_fused,
    }
    # The others are their definitions as they stand.
    for card in cards():
        definition = next(each for each in implementations(card.name) if each.name == REFERENCE)
        functions.setdefault(card.name, definition.function)
    return {overload(name): function for name, function in functions.items()}
