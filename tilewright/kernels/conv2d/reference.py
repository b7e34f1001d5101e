"""Two-dimensional convolution with a fused epilogue (the definition).

    y[n, o, p, q] = activation(b[o] + r[n, o, p, q]
        + sum_{i, j, c} x[n, g C' + c, p s_h + i d_h - top, q s_w + j d_w - left] * w[o, i, j, c])

for C' = C / groups input channels in the group g = o // (Co / groups) of the output channel; x is 0 outside the image.
Everything is float32 (float64 for float64) and is cast once, to the dtype of x.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tilewright.kernels.activation import apply_activation
from tilewright.kernels.conv_geometry import check_sizes, oihw, pad_image, to_channels_last


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """The sums alone: x [N, C, H, W], OHWI weight of the same float dtype -> [N, Co, P, Q]; sizes of 0 are allowed."""
    geometry = check_sizes("convolve", x.shape, weight.shape, stride, padding, dilation, groups)
    if 0 in (geometry.batch, geometry.in_channels, geometry.out_channels):
        return x.new_zeros(geometry.out_shape)
    image, symmetric = pad_image(x, padding)
    return F.conv2d(image, oihw(weight), None, tuple(stride), symmetric, tuple(dilation), groups)


def conv2d_fused(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    negative_slope: float = 0.01,
    allow_tf32: bool = False,
) -> torch.Tensor:
    """x float [N, C, H, W], weight [Co, R, S, C / groups], bias [Co], residual [N, Co, P, Q] -> x.dtype [N, Co, P, Q]
    in channels-last order.

    padding: top, bottom, left, right. negative_slope: of "leaky_relu". allow_tf32: float32 products may be rounded to
    TF32 on a GPU.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    on_gpu = x.device.type == "cuda"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allow_tf32) if on_gpu else contextlib.nullcontext():
        y = convolve(x.to(wide), weight.to(wide), stride, padding, dilation, groups)
    if bias is not None:
        y = y + bias.to(wide).view(-1, 1, 1)
    if residual is not None:
        y = y + residual.to(wide)
    y = apply_activation(y, activation, negative_slope=negative_slope)
    return to_channels_last(y.to(x.dtype))
