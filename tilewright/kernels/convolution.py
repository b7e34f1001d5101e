"""What the cards of fused convolutions share: checks, problems, fake results, samples.

Under autocast the float convolution casts x, residual and weight, as PyTorch's own does, and leaves the bias; the
quantised operators take what they are given. The float convolution has gradients for x, weight, bias and residual; the
quantised ones are for inference, and say so if a gradient is asked of them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from tilewright.kernels.activation import CONV_ACTIVATIONS, check_activation
from tilewright.kernels.checks import check_devices, check_input, check_vector
from tilewright.kernels.conv_geometry import ConvGeometry, check_sizes, empty_channels_last
from tilewright.kernels.dispatch.card import Arguments, Kernel, on_gpu
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.formats.weight import Draw

INTEGERS = (torch.int8, torch.uint8)
#: Parts of schemas.
WINDOW = "int[2] stride=1, int[4] padding=0, int[2] dilation=1, int groups=1"
ACTIVATION = "str activation='none', float negative_slope=0.01"
#: One kernel of a family serves float and int8.
_FAMILY = {"1 x 1": "pointwise", "depthwise": "depthwise", "few channels": "stem", "implicit product": "implicit"}
ON_GPU = tuple(on_gpu(f"Triton, {name}", f"..conv2d.triton_{kind}") for name, kind in _FAMILY.items())
KERNELS = tuple(Kernel(f"..conv2d.triton_{kind}") for kind in _FAMILY.values())
#: What the checks return: the sizes, and the dtype of the result.
Checked = tuple[ConvGeometry, torch.dtype]
_EXAMPLE = ConvGeometry(2, 16, 9, 7, 24, (3, 3), (1, 2), (1, 1, 1, 1))


def example(op: str, dtype: torch.dtype) -> Problem:
    """A 3 x 3 convolution of small images."""
    return convolution_problem(op, _EXAMPLE, dtype, dtype, bias=True, activation="relu")


def convolution_problem(
    op: str, geometry: ConvGeometry, dtype: torch.dtype, out_dtype: torch.dtype | None, **facts: Any
) -> Problem:
    """The problem of a convolution of these sizes."""
    return Problem(
        op,
        m=geometry.batch * geometry.out_height * geometry.out_width,
        n=geometry.out_channels,
        k=geometry.taps * geometry.group_channels,
        x_dtype=dtype,
        conv=geometry,
        out_dtype=out_dtype,
        **facts,
    )


def posed(op: str, arguments: Arguments, checked: Checked) -> Problem:
    """The problem that a call poses."""
    x, residual = arguments["x"], arguments["residual"]
    geometry, out_dtype = checked
    return convolution_problem(
        op,
        geometry,
        x.dtype,
        out_dtype,
        activation=arguments["activation"],
        bias=arguments["bias"] is not None,
        residual=residual is not None,
        residual_dtype=None if residual is None else residual.dtype,
        allow_tf32=arguments.get("allow_tf32", False),
        **device_facts(x.device),
    )


def check_window(op: str, arguments: Arguments) -> ConvGeometry:
    """What all fused convolutions demand alike."""
    x, bias, residual = arguments["x"], arguments["bias"], arguments["residual"]
    window = (arguments[name] for name in ("stride", "padding", "dilation", "groups"))
    geometry = check_sizes(op, x.shape, arguments["weight"].shape, *window)
    check_devices(op, arguments)
    check_activation(arguments["activation"], CONV_ACTIVATIONS)
    check_vector(op, "bias", bias, geometry.out_channels)
    if residual is not None:
        shape = list(geometry.out_shape)
        if residual.dim() != 4 or any(a != b for a, b in zip(residual.shape, shape, strict=True)):
            raise ValueError(f"{op}: residual must have the shape of the result, {shape}, not {list(residual.shape)}")
    return geometry


def check_float(op: str, arguments: Arguments) -> Checked:
    """A convolution that multiplies in the dtype of x."""
    x, weight, bias, residual = (arguments[name] for name in ("x", "weight", "bias", "residual"))
    check_input(op, x)
    if weight.dtype != x.dtype:
        raise TypeError(f"{op}: weight must have the dtype of x, {x.dtype}, not {weight.dtype}")
    geometry = check_window(op, arguments)
    if bias is not None and bias.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"{op}: bias must be float32 or have the dtype of x, {x.dtype}, not {bias.dtype}")
    if residual is not None and not residual.is_floating_point():
        raise TypeError(f"{op}: residual must be a float tensor, not {residual.dtype}")
    return geometry, x.dtype


def fake(arguments: Arguments, checked: Checked) -> torch.Tensor:
    """The result, channels-last."""
    geometry, dtype = checked
    return empty_channels_last(geometry.out_shape, dtype, arguments["x"].device)


# ---- samples
def sizes_of(problem: Problem) -> ConvGeometry:
    """The sizes of the convolution. Raises ValueError if the problem has none."""
    if problem.conv is None:
        raise ValueError(f"{problem.op} without the sizes of a convolution")
    return problem.conv


def image(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A random channels-last image [N, C, H, W]."""
    n, channels, height, width = shape
    if dtype.is_floating_point:
        return draw.normal(n, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)
    low = -127 if dtype == torch.int8 else 1
    return draw.integers(low, low + 255, n, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)


def input_of(problem: Problem, draw: Draw) -> torch.Tensor:
    """x."""
    sizes = sizes_of(problem)
    return image(draw, (sizes.batch, sizes.in_channels, sizes.height, sizes.width), problem.x_dtype)


def spread_of(problem: Problem) -> float:
    """What a weight of order 1 is multiplied with, so that the sums are."""
    sizes = sizes_of(problem)
    return max(math.prod(sizes.kernel) * sizes.group_channels, 1) ** -0.5


def rest_of(problem: Problem, draw: Draw) -> dict[str, Any]:
    """The arguments that all fused convolutions have, but x and the weight."""
    sizes = sizes_of(problem)
    out_dtype = problem.out_dtype or problem.x_dtype
    residual_dtype = problem.residual_dtype or (out_dtype if problem.residual else None)
    return {
        "bias": draw.normal(sizes.out_channels, dtype=torch.float32) if problem.bias else None,
        "residual": None if residual_dtype is None else image(draw, sizes.out_shape, residual_dtype),
        "stride": list(sizes.stride),
        "padding": list(sizes.padding),
        "dilation": list(sizes.dilation),
        "groups": sizes.groups,
        "activation": problem.activation,
    }


def as_float(problem: Problem) -> Problem:
    """The same convolution as ``conv2d_fused`` is asked about it."""
    return replace(problem, op="conv2d_fused")
