"""Float convolution on a CPU: C kernels for float32, else oneDNN's fused convolution, whose weights are reordered once.

oneDNN is private in PyTorch, is probed once, and takes 28 microseconds a call before it computes anything, as it makes
its descriptors anew: as much as a layer of a small network. The C kernels take 3.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from tilewright.kernels.activation import TABLE
from tilewright.kernels.conv2d import reference
from tilewright.kernels.conv_geometry import empty_channels_last, oihw, out_size, pad_image, to_channels_last
from tilewright.kernels.cpu import steps as conv_steps
from tilewright.kernels.cpu.probes import _Case, _probe
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import activate_in_place
from tilewright.kernels.formats.weight import Draw

#: Those that oneDNN's fused convolution has: name, scalars, algorithm.
_ONEDNN_ACTIVATIONS = {row.name: row.onednn for row in TABLE.values() if row.onednn is not None}


def why_not(problem: Problem) -> str | None:
    """Why the C kernels do not take the problem, or None."""
    if problem.x_dtype != torch.float32:
        return f"the C kernels take float32, not {problem.x_dtype}"
    if problem.residual_dtype not in (None, torch.float32):
        return f"the C kernels add a float32 residual, not {problem.residual_dtype}"
    return conv_steps.why_not_conv(problem.conv, problem.x_dtype, problem.activation)


def conv2d_fused(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    allow_tf32: bool = False,
    residual_zero_point: int = 0,
    **rest: Any,
) -> torch.Tensor:
    """See ``reference.conv2d_fused``, and of int8 x ``int8_conv2d.reference``. rest: of ``steps.convolution``."""
    convolution = conv_steps.convolution(weight, bias, **rest)
    stride, padding, dilation, groups = window = convolution.window
    prepared = conv_steps.packed_weight(weight, groups, x.shape, window)
    x = conv_steps.channels_last(x)
    n, _, h, w = x.shape
    out_channels, kernel_height, kernel_width, _ = weight.shape
    height = out_size(h, kernel_height, stride[0], padding[:2], dilation[0])
    width = out_size(w, kernel_width, stride[1], padding[2:], dilation[1])
    dtype = out_dtype or (torch.float32 if convolution.out_scale is None else torch.int8)
    y = empty_channels_last((n, out_channels, height, width), dtype, x.device)
    description = conv_steps.description_of(prepared, x, y, convolution)
    conv_steps.run_with(description, x, y, residual, residual_scale, residual_zero_point)
    return y


# ---- oneDNN
@functools.cache
def why_no_onednn() -> str | None:
    """Why oneDNN's fused convolution cannot be used, or None."""

    def check(draw: Draw) -> _Case:
        x, w, b = draw.normal(1, 24, 14, 14), draw.normal(40, 3, 3, 24), draw.normal(40)
        x = x.contiguous(memory_format=torch.channels_last)
        residual = draw.normal(1, 40, 14, 14).contiguous(memory_format=torch.channels_last)
        expected = reference.conv2d_fused(x, w, b, residual, padding=(1, 1, 1, 1), activation="relu")
        run = functools.partial(onednn_conv2d_fused, x, w, b, residual, padding=(1, 1, 1, 1), activation="relu")
        return run(), expected, run

    return _probe("oneDNN's fused convolution", check, 1e-5)


def why_not_onednn(problem: Problem) -> str | None:
    """Why oneDNN's fused convolution does not take the problem, or None."""
    geometry = problem.conv
    if geometry is None:
        return "no convolution"
    if problem.x_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"oneDNN has no convolution of {problem.x_dtype}"
    if problem.x_dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 instructions"
    if problem.x_dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "this CPU has no float16 instructions"
    if 0 in (geometry.batch, geometry.in_channels, geometry.out_channels):
        return "nothing to multiply"
    if problem.activation not in _ONEDNN_ACTIVATIONS:
        return f"oneDNN's fused convolution has no {problem.activation}"
    if problem.residual and problem.x_dtype != torch.float32:
        return "oneDNN would round the sum before the residual is added"
    return why_no_onednn()


def onednn_conv2d_fused(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    allow_tf32: bool = False,
    **rest: Any,
) -> torch.Tensor:
    """See ``reference.conv2d_fused``. rest: of ``steps.convolution``."""
    convolution = conv_steps.convolution(weight, bias, **rest)
    (stride, padding, dilation, groups), activation = convolution.window, convolution.activation
    x, symmetric = pad_image(x, padding)
    x = x.contiguous(memory_format=torch.channels_last)
    window = (list(symmetric), list(stride), list(dilation))
    fused = packed(
        weight,
        f"onednn-conv-{groups}-{window}-{tuple(x.shape)}",
        lambda: torch.ops.mkldnn._reorder_convolution_weight(
            oihw(weight.detach()).contiguous(memory_format=torch.channels_last), *window, groups, list(x.shape)
        ),
    )
    bias = None if bias is None else bias.to(x.dtype).contiguous()  # oneDNN looks at no strides
    after = "none" if residual is not None or not TABLE[activation].onednn_keeps_nan else activation
    if residual is None:
        attributes = _ONEDNN_ACTIVATIONS[after]
        y = torch.ops.mkldnn._convolution_pointwise(x, fused, bias, *window, groups, *attributes)
    else:
        residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, fused, bias, *window, groups, "add", None, None, [], ""
        )
    return to_channels_last(y if after == activation else activate_in_place(y, activation))
