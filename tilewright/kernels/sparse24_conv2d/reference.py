"""Convolution with a 2:4 weight (the definition): the weight unpacked to OHWI, then ``conv2d_fused``.

    weight_values  float [Co * kh * kw, 2 G]      G = ceil(Ci / groups / 4)
    weight_meta    uint8 [Co * kh * kw, ceil(G / 2)]

as in ``formats.sparse24``, with a row for each output channel and place in the window (o, r, s): groups of four are
input channels and never reach from one place into the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilewright.kernels.conv2d import reference
from tilewright.kernels.formats import sparse24


def unpack_weight(
    x: torch.Tensor, weight_values: torch.Tensor, weight_meta: torch.Tensor, kernel_size: Sequence[int], groups: int
) -> torch.Tensor:
    """OHWI [Co, kh, kw, Ci / groups] in the dtype of x."""
    channels = x.shape[1] // groups
    return (
        sparse24.unpack(weight_values, weight_meta, channels)
        .to(x.dtype)
        .reshape(len(weight_values) // (kernel_size[0] * kernel_size[1]), *kernel_size, channels)
    )


def sparse24_conv2d_fused(
    x: torch.Tensor,
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    kernel_size: Sequence[int] = (1, 1),
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    negative_slope: float = 0.01,
    allow_tf32: bool = False,
) -> torch.Tensor:
    """x float [N, Ci, H, W] -> x.dtype [N, Co, H', W'], channels-last; the rest as in ``conv2d.reference``."""
    weight = unpack_weight(x, weight_values, weight_meta, kernel_size, groups)
    rest = (stride, padding, dilation, groups, activation, negative_slope, allow_tf32)
    return reference.conv2d_fused(x, weight, bias, residual, *rest)
