"""Shapes of a two-dimensional convolution, the checks of them, and the memory layouts of its tensors.

x [N, C, H, W] and the result [N, Co, P, Q] are logically NCHW; the result lies in ``torch.channels_last`` order. The
weight is OHWI, contiguous [Co, R, S, C / groups].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class ConvGeometry:
    """All sizes of one convolution. padding: top, bottom, left, right; stride, dilation: vertical, horizontal.

    ``None`` of a ``Problem`` for what is no convolution. The sizes may be symbolic where a graph is traced.
    """

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def out_height(self) -> int:
        """Rows of the result."""
        return out_size(self.height, self.kernel[0], self.stride[0], self.padding[:2], self.dilation[0])

    @property
    def out_width(self) -> int:
        """Columns of the result."""
        return out_size(self.width, self.kernel[1], self.stride[1], self.padding[2:], self.dilation[1])

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[N, Co, P, Q]."""
        return self.batch, self.out_channels, self.out_height, self.out_width

    @property
    def group_channels(self) -> int:
        """Input channels of one group."""
        return self.in_channels // self.groups

    @property
    def taps(self) -> int:
        """Positions of the kernel window."""
        return self.kernel[0] * self.kernel[1]

    @property
    def pointwise(self) -> bool:
        """Whether each output pixel looks at one input pixel, and never at padding."""
        return self.taps == 1 and not any(self.padding)

    @property
    def depthwise(self) -> bool:
        """Whether each output channel looks at one input channel, of several."""
        return self.groups > 1 and self.groups == self.in_channels


def out_size(size: int, kernel: int, stride: int, padding: Sequence[int], dilation: int) -> int:
    """Positions of a window along one dimension; zero or negative if it does not fit once."""
    return (size + padding[0] + padding[1] - dilation * (kernel - 1) - 1) // stride + 1


def check_sizes(
    op: str,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvGeometry:
    """The geometry of a convolution of x [N, C, H, W] with a weight [Co, R, S, C / groups] of these shapes.

    Raises ValueError that names the operator and the argument.
    """
    for name, shape, dimensions in (
        ("x", x_shape, "[N, C, H, W]"),
        ("weight", weight_shape, "[Co, kh, kw, C / groups]"),
    ):
        if len(shape) != 4:
            raise ValueError(f"{op}: {name} must have four dimensions {dimensions}, not shape {list(shape)}")
    for name, values, length, least in (
        ("stride", stride, 2, 1),
        ("padding", padding, 4, 0),
        ("dilation", dilation, 2, 1),
        ("groups", (groups,), 1, 1),
    ):
        if len(values) != length or any(value < least for value in values):
            required = "an integer" if length == 1 else f"{length} integers"
            displayed = list(values) if length > 1 else values[0]
            raise ValueError(f"{op}: {name} must be {required} of at least {least}, not {displayed}")
    n, channels, height, width = x_shape
    out_channels, *kernel, group_channels = weight_shape
    if channels != group_channels * groups:
        raise ValueError(
            f"{op}: x has {channels} channels, but weight of shape {list(weight_shape)} takes {group_channels} in "
            f"each of {groups} groups, so {group_channels * groups}"
        )
    if out_channels % groups:
        raise ValueError(f"{op}: the {out_channels} output channels of weight do not divide into {groups} groups")
    if 0 in kernel:
        raise ValueError(f"{op}: weight of shape {list(weight_shape)} has an empty window")
    geometry = ConvGeometry(
        n,
        channels,
        height,
        width,
        out_channels,
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (padding[0], padding[1], padding[2], padding[3]),
        (dilation[0], dilation[1]),
        groups,
    )
    if geometry.out_height <= 0 or geometry.out_width <= 0:
        raise ValueError(
            f"{op}: a window of {kernel[0]} x {kernel[1]} with dilation {list(dilation)} does not fit into an image of "
            f"{height} x {width} with padding {list(padding)}"
        )
    return geometry


def empty_channels_last(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised [N, C, H, W] tensor with the strides that every convolution returns."""
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=torch.channels_last)


def to_channels_last(y: torch.Tensor) -> torch.Tensor:
    """``y`` [N, C, H, W] with exactly the strides of ``empty_channels_last``; a view wherever memory allows one.

    ``contiguous(memory_format=...)`` leaves any stride where a size is 1, and fake tensors would then not agree.
    """
    n, c, h, w = y.shape
    if y.stride() == (h * w * c, 1, w * c, c):
        return y
    return y.permute(0, 2, 3, 1).reshape(-1).view(n, h, w, c).permute(0, 3, 1, 2)


def oihw(weight: torch.Tensor) -> torch.Tensor:
    """A view of an OHWI weight in the order that ``torch.nn.functional.conv2d`` takes."""
    return weight.permute(0, 3, 1, 2)


def pad_image(x: torch.Tensor, padding: Sequence[int], value: float = 0) -> tuple[torch.Tensor, tuple[int, int]]:
    """(image, symmetric padding left to apply): ``x`` itself unless opposite sides differ, which PyTorch cannot pad.

    value: what stands for 0.
    """
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), value=value), (0, 0)
