"""int8 convolution on a CPU: C kernels, bit for bit the definition; else oneDNN's integer sums with a float32 epilogue.

The C kernels read int8 as it is and write int8, so a network keeps one byte for each activation. "silu" alone is
rounded otherwise than PyTorch rounds it, by a unit in the last place of float32 or two: where that value lies so close
to the middle between two integers, the quantised result is the other one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from tilewright.kernels.conv2d.cpu import conv2d_fused
from tilewright.kernels.conv_geometry import empty_channels_last, oihw, pad_image, to_channels_last
from tilewright.kernels.cpu import steps as conv_steps
from tilewright.kernels.cpu.probes import _Case, _probe, _random_int8
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import activate_in_place
from tilewright.kernels.formats.weight import Draw
from tilewright.kernels.int8_conv2d import reference


def why_not(problem: Problem) -> str | None:
    """Why the C kernels do not take the problem, or None."""
    if problem.out_dtype not in conv_steps.TYPES:
        return f"the C kernels return int8, uint8 or float32, not {problem.out_dtype}"
    if problem.residual_dtype is not None and problem.residual_dtype not in conv_steps.TYPES:
        return f"the C kernels add an int8, uint8 or float32 residual, not {problem.residual_dtype}"
    return conv_steps.why_not_conv(problem.conv, problem.x_dtype, problem.activation)


#: One function does both: the dtypes of the arguments tell which kernel runs.
int8_conv2d_fused = conv2d_fused


# ---- quantising
def why_not_quantize(problem: Problem) -> str | None:
    """Why the C kernels do not quantise, or None."""
    if problem.x_dtype != torch.float32:
        return f"the C kernels quantise float32, not {problem.x_dtype}"
    if problem.m * problem.k == 0:
        return "nothing to quantise"
    return conv_steps.why_no_kernels()


def quantize_per_tensor(
    x: torch.Tensor, scale: float, out_dtype: torch.dtype | None = None, zero_point: int = 0
) -> torch.Tensor:
    """See ``reference.quantize_per_tensor``."""
    image = x if x.dim() == 4 else x.contiguous().view(1, 1, -1, x.shape[-1])
    y = empty_channels_last(image.shape, out_dtype or torch.int8, x.device)
    conv_steps.run(conv_steps.describe_convert(image, y, scale, zero_point))
    return y if x.dim() == 4 else y.view(x.shape)


def quantize_per_tensor_marked(
    x: torch.Tensor, scale: float, sample_dims: int, out_dtype: torch.dtype | None = None, zero_point: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.quantize_per_tensor_marked``: in one pass."""
    image = x if x.dim() == 4 else x.contiguous().view(1, 1, -1, x.shape[-1])
    y, marks = empty_channels_last(image.shape, out_dtype or torch.int8, x.device), torch.empty(x.shape[:sample_dims])
    conv_steps.run(conv_steps.describe_convert(image, y, scale, zero_point, marks))
    return (y if x.dim() == 4 else y.view(x.shape)), marks


# ---- oneDNN
def _sums(
    x: torch.Tensor, weight: torch.Tensor, window: conv_steps.Window, x_nonnegative: bool, x_zero_point: int = 0
) -> torch.Tensor:
    """float32 of the integer sums, channels-last."""
    stride, padding, dilation, groups = window
    offset = 0 if x_nonnegative and x.dtype == torch.int8 else 128
    zero_point = offset + x_zero_point
    u8 = x.view(torch.uint8) if x.dtype == torch.int8 else x
    if x.dtype == torch.int8 and offset:
        u8 = u8 ^ 128
    u8, symmetric = pad_image(u8, padding, zero_point)
    u8 = u8.contiguous(memory_format=torch.channels_last)
    symmetric_window = (list(stride), list(symmetric), list(dilation), groups)

    def prepack() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ones, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int32)
        filters = oihw(weight).contiguous()
        return (
            torch.ops.onednn.qconv_prepack(filters, ones, 1.0, zero_point, *symmetric_window, list(u8.shape)),
            ones,
            zeros,
        )

    filters, ones, zeros = packed(weight, f"onednn-qconv-{symmetric_window}-{zero_point}-{tuple(u8.shape)}", prepack)
    return torch.ops.onednn.qconv_pointwise(
        u8, 1.0, zero_point, filters, ones, zeros, None, *symmetric_window, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.cache
def why_no_qconv() -> str | None:
    """Why oneDNN's quantised convolution cannot be used, or None."""

    def check(draw: Draw) -> _Case:
        x, w = _random_int8(draw, 1, 14, 14, 24).permute(0, 3, 1, 2), _random_int8(draw, 40, 3, 3, 24)
        window = ((1, 1), (1, 1, 1, 1), (1, 1), 1)
        expected = reference.int8_conv2d_fused(x, 1.0, w, torch.ones(40), None, None, 1.0, *window)
        return _sums(x, w, window, False), expected, lambda: _sums(x, w, window, False)

    return _probe("oneDNN's quantised convolution", check, 1e-7)


def why_not_onednn(problem: Problem) -> str | None:
    """Why oneDNN's quantised convolution does not take the problem, or None."""
    geometry = problem.conv
    if geometry is None:
        return "no convolution"
    if 0 in (geometry.batch, geometry.in_channels, geometry.out_channels):
        return "nothing to multiply"
    if geometry.taps * geometry.group_channels > conv_steps.LARGEST_DEPTH:
        return f"int32 sums of u8 products may overflow beyond {conv_steps.LARGEST_DEPTH} values in a window"
    return why_no_qconv()


def onednn_int8_conv2d_fused(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    residual_zero_point: int = 0,
    **rest: Any,
) -> torch.Tensor:
    """See ``reference.int8_conv2d_fused``: oneDNN gives the integer sums, PyTorch the definition's own epilogue.

    oneDNN's own would multiply by 1 / out_scale where the definition divides, and add the residual after rounding it.
    """
    convolution = conv_steps.convolution(weight, bias, **rest)
    y = _sums(x, weight, convolution.window, convolution.x_nonnegative, convolution.x_zero_point)
    y.mul_((rest["weight_scale"] * torch.full((), convolution.x_scale)).view(-1, 1, 1))
    if bias is not None:
        y.add_(bias.float().view(-1, 1, 1))
    if residual is not None:
        y.add_((reference.integers(residual, torch.float32) - residual_zero_point) * torch.full((), residual_scale))
    y = activate_in_place(y, convolution.activation, convolution.negative_slope)
    if convolution.out_scale is not None:
        return torch.ops.tilewright.quantize_per_tensor(y, convolution.out_scale, out_dtype, convolution.out_zero_point)
    return to_channels_last(y.to(out_dtype or torch.float32))
