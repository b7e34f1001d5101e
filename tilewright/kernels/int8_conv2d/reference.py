"""Two-dimensional convolution of int8 by int8, W8A8 with one static scale for all activations (the definition).

    y[n, o, p, q] = activation(sum[n, o, p, q] * (s_x * s_w[o]) + b[o] + (r[n, o, p, q] - z_r) * s_r)

The sum of products (x - z_x) w of integers, as in ``conv2d.reference``, is exact; the rest is float32. With a scale s_y
for the result, it is q = clamp(round_half_even(y / s_y) + z_y, -127, 127) by an IEEE division; else one cast.

Weights are symmetric. A tensor of activations stands for (q - z) s with a zero point z of its own, -127 to 127: after a
ReLU, z = -127 puts all 255 integers to use. int8 is its own value; uint8 stands for value + 128. Padding is the zero
point.

A static scale leaves no place for what is not finite: in a quantised tensor NaN becomes the zero point and an infinity
the largest integer of its sign. So where floats are quantised, each sample that is not finite gets a mark, NaN, and
whoever makes floats again of what was made of its integers adds the mark to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tilewright.kernels.conv2d.reference import convolve
from tilewright.kernels.conv_geometry import to_channels_last
from tilewright.kernels.epilogue import activate_in_place


def integers(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values that an int8 or offset uint8 tensor stands for, in a float dtype."""
    return x.to(dtype) - 128 if x.dtype == torch.uint8 else x.to(dtype)


def quantize_per_tensor(
    x: torch.Tensor, scale: float, out_dtype: torch.dtype | None = None, zero_point: int = 0
) -> torch.Tensor:
    """``x`` float of any shape -> int8 (or uint8 = value + 128) clamp(round_half_even(x / scale) + zero_point, -127,
    127), by an IEEE float32 division; channels-last if it has four dimensions. NaN becomes the zero point.
    """
    v = x.float()
    # Divided by a tensor: on CUDA, PyTorch multiplies by the reciprocal of a number, which rounds otherwise.
    steps = torch.round(v / torch.full((), scale, device=x.device)).nan_to_num(0.0, torch.inf, -torch.inf)
    steps = (steps + zero_point).clamp(-127, 127)
    q = (steps + 128).to(torch.uint8) if out_dtype == torch.uint8 else steps.to(torch.int8)
    return to_channels_last(q) if q.dim() == 4 else q.contiguous()


def marks_of(x: torch.Tensor, sample_dims: int) -> torch.Tensor:
    """float32 of the first ``sample_dims`` dimensions of ``x``, at most all but its last: 0, and NaN where a value of
    that sample is not finite.
    """
    if not x.numel():
        return torch.zeros(x.shape[:sample_dims], device=x.device)
    return torch.linalg.vector_norm(x, math.inf, tuple(range(sample_dims, x.dim()))).mul(0).float()


def quantize_per_tensor_marked(
    x: torch.Tensor, scale: float, sample_dims: int, out_dtype: torch.dtype | None = None, zero_point: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_per_tensor``, and ``marks_of`` the same tensor."""
    return quantize_per_tensor(x, scale, out_dtype, zero_point), marks_of(x, sample_dims)


def int8_conv2d_fused(
    x: torch.Tensor,
    x_scale: float,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
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
    x_zero_point: int = 0,
    residual_zero_point: int = 0,
    out_zero_point: int = 0,
) -> torch.Tensor:
    """x int8 or uint8 [N, C, H, W], weight int8 [Co, R, S, C / groups], weight_scale float32 [Co], bias float32 [Co],
    residual int8, uint8 or float [N, Co, P, Q] -> [N, Co, P, Q] in channels-last order.

    With out_scale the result is int8, or uint8 if out_dtype says so; without, out_dtype, or float32. padding: top,
    bottom, left, right. x_nonnegative: promises that an int8 x holds 0 to 127, for implementations that can use it.
    Zero points: -127 to 127, of integers alone.
    """
    total = convolve(integers(x, torch.float64) - x_zero_point, weight.double(), stride, padding, dilation, groups)
    scale = torch.full((), x_scale, device=x.device) * weight_scale.float()
    y = total.float() * scale.view(-1, 1, 1)
    if bias is not None:
        y = y + bias.float().view(-1, 1, 1)
    if residual is not None:
        values = integers(residual, torch.float32) - residual_zero_point
        y = y + values * torch.full((), residual_scale, device=x.device)
    y = activate_in_place(y, activation, negative_slope)  # each number as if it stood alone, whatever the batch
    if out_scale is not None:
        return quantize_per_tensor(y, out_scale, out_dtype, out_zero_point)
    return to_channels_last(y.to(out_dtype or torch.float32))
