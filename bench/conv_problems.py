"""Arguments for the convolutions, and what their result must be: one source for tests, emulation and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.activation import apply_activation
from tilewright.kernels.conv2d import reference as float_reference
from tilewright.kernels.conv_geometry import oihw
from tilewright.kernels.int8_conv2d import reference as int8_reference

INTEGERS = (torch.int8, torch.uint8)


@dataclass(frozen=True)
class ConvShape:
    """x [batch, channels, height, width] of ``dtype``, which is also that of the result, and out_channels windows.

    size: height and width, or both at once; window, stride, dilation likewise. padding: top, bottom, left, right, or
    None for half of the window on each side. int8 and uint8 are requantised; out_dtype: a float dtype instead.
    zero_points: of x, of the residual, of the result, as far as these are integers.
    """

    batch: int
    channels: int
    size: int | tuple[int, int]
    out_channels: int
    window: int | tuple[int, int] = 1
    stride: int | tuple[int, int] = 1
    padding: tuple[int, int, int, int] | None = None
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype | None = None
    bias: bool = True
    residual: bool = False
    activation: str = "none"
    allow_tf32: bool = False
    zero_points: tuple[int, int, int] = (0, 0, 0)

    @property
    def op(self) -> str:
        """The operator for ``dtype``."""
        return "int8_conv2d_fused" if self.dtype in INTEGERS else "conv2d_fused"


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def make_conv_arguments(shape: ConvShape, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Arguments of ``shape.op`` by name, random and from ``seed`` alone, so alike on every device. Sums are of order
    1. Images are channels-last.
    """
    if device == "meta":
        with torch.device("meta"):
            return _arguments(shape, None)
    arguments = _arguments(shape, torch.Generator().manual_seed(seed))
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def _arguments(shape: ConvShape, generator: torch.Generator | None) -> dict[str, Any]:
    def image(n: int, channels: int, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        size = (n, height, width, channels)
        if dtype in INTEGERS:
            low = -127 if dtype == torch.int8 else 1
            values = torch.randint(low, low + 255, size, generator=generator, dtype=dtype)
        else:
            values = torch.randn(size, generator=generator).to(dtype)
        return values.permute(0, 3, 1, 2)

    window, stride, dilation, size = (
        _pair(value) for value in (shape.window, shape.stride, shape.dilation, shape.size)
    )
    half = tuple(d * (w - 1) // 2 for d, w in zip(dilation, window, strict=True))
    padding = shape.padding or (half[0], half[0], half[1], half[1])
    spans = zip(size, window, stride, dilation, (padding[:2], padding[2:]), strict=True)
    out_size = [(h + sum(p) - d * (w - 1) - 1) // s + 1 for h, w, s, d, p in spans]
    group_channels = shape.channels // shape.groups
    spread = max(group_channels * window[0] * window[1], 1) ** -0.5
    integer = shape.dtype in INTEGERS
    out_dtype = shape.out_dtype or shape.dtype
    weight_size = (shape.out_channels, *window, group_channels)
    arguments: dict[str, Any] = {"x": image(shape.batch, shape.channels, *size, shape.dtype)}
    if integer:
        scale = torch.rand(shape.out_channels, generator=generator) + 0.5
        arguments |= {
            "x_scale": 1 / 73,
            "weight": torch.randint(-127, 128, weight_size, generator=generator, dtype=torch.int8),
            "weight_scale": scale * (spread / 73),
        }
    else:
        arguments["weight"] = (torch.randn(weight_size, generator=generator) * spread).to(shape.dtype)
    arguments |= {
        "bias": torch.randn(shape.out_channels, generator=generator) if shape.bias else None,
        "residual": image(shape.batch, shape.out_channels, *out_size, out_dtype) if shape.residual else None,
        "stride": list(stride),
        "padding": list(padding),
        "dilation": list(dilation),
        "groups": shape.groups,
        "activation": shape.activation,
        "negative_slope": 0.2,
    }
    if not integer:
        return arguments | {"allow_tf32": shape.allow_tf32}
    quantized = out_dtype in INTEGERS
    zero, residual_zero, out_zero = shape.zero_points
    return arguments | {
        "x_zero_point": zero,
        "residual_zero_point": residual_zero if quantized and shape.residual else 0,
        "out_zero_point": out_zero if quantized else 0,
        "residual_scale": 1 / 73 if quantized else 1.0,
        "out_scale": 1 / 40 if quantized else None,
        "out_dtype": out_dtype,
    }


def reference_result(op: str, arguments: dict[str, Any]) -> torch.Tensor:
    """The definition's result."""
    return getattr(int8_reference if op == "int8_conv2d_fused" else float_reference, op)(**arguments)


def exact_before_rounding(op: str, arguments: dict[str, Any]) -> torch.Tensor:
    """The convolution in float64 from the operands as they are: before division by out_scale, or the final cast."""
    x, weight = int8_reference.integers(arguments["x"], torch.float64), arguments["weight"].double()
    window = (arguments[name] for name in ("stride", "padding", "dilation", "groups"))
    y = float_reference.convolve(x - arguments.get("x_zero_point", 0), weight, *window)
    residual_scale = 1.0
    if op == "int8_conv2d_fused":
        y = y * (arguments["x_scale"] * arguments["weight_scale"].double()).view(-1, 1, 1)
        residual_scale = arguments["residual_scale"]
    if arguments["bias"] is not None:
        y = y + arguments["bias"].double().view(-1, 1, 1)
    if arguments["residual"] is not None:
        residual = int8_reference.integers(arguments["residual"], torch.float64)
        y = y + (residual - arguments.get("residual_zero_point", 0)) * residual_scale
    return apply_activation(y, arguments["activation"], negative_slope=arguments["negative_slope"])


def plain_result(arguments: dict[str, Any]) -> torch.Tensor:
    """What a user of PyTorch would write for the float operator, in the dtype of x throughout."""
    x, weight, padding = arguments["x"], arguments["weight"], arguments["padding"]
    image = F.pad(x, (padding[2], padding[3], padding[0], padding[1]))
    bias = None if arguments["bias"] is None else arguments["bias"].to(x.dtype)
    y = F.conv2d(image, oihw(weight), bias, arguments["stride"], 0, arguments["dilation"], arguments["groups"])
    if arguments["residual"] is not None:
        y = y + arguments["residual"]
    return apply_activation(y, arguments["activation"], negative_slope=arguments["negative_slope"])
