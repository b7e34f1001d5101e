"""What quantising a convolution does to the mean of its results, without computing them.

A convolution is linear. So the mean of its results, over images and positions, is the product of its weight with the
mean of what each tap of the window reads: one pass over an input, where results take a product each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.conv_geometry import out_size
from tilewright.nn import Int8ConvBnAct2d

#: So many int8 numbers have a sum of 16 bits.
_FIT_INT16 = 2**15 // 2**7 - 1


class MeanShift:
    """Takes from ``layer`` what the mean of each channel of its results errs by, before residual and activation.

    exact: the float layer that it stands for.
    """

    def __init__(self, exact: Any, layer: Int8ConvBnAct2d):
        self.exact, self.layer = exact, layer
        self._sum = torch.zeros(layer.out_channels, dtype=torch.float64)
        self._taken = torch.zeros(layer.out_channels, dtype=torch.float64)
        self._count = 0

    def add(self, x: torch.Tensor, q: torch.Tensor, padding: Any) -> None:
        """One more call of the layer: on ``x``, float, which is ``q`` in int8. padding: as of ``ConvLayer.run``."""
        layer = self.layer
        images, codes = layer._as_images(x), layer._as_images(q)
        pads = padding or layer.padding_for(images.shape[2], images.shape[3])
        exact = _over_images(images).double()
        rounded = (_over_images(codes).double() - len(codes) * layer.x_zero) * layer.x_scale
        read, positions = _read_by_taps(torch.stack([exact - rounded, exact]), layer, pads)
        lost, whole = read.float().view(2, -1, layer.groups, layer.in_channels // layer.groups)
        weight = layer.dequantize_weight()
        error = self.exact.dequantize_weight() - weight
        # W x - W' x' = W' (x - x') + (W - W') x
        shift = _product(weight, lost, layer.groups) + _product(error, whole, layer.groups)
        if not bool(torch.isfinite(shift).all()) or not positions:
            return
        self._sum += shift.to("cpu", torch.float64)
        self._count += positions * len(images)
        mean = self._sum / self._count
        layer.correct_bias((mean - self._taken).to(layer.device, torch.float32))
        self._taken = mean


def _over_images(images: torch.Tensor) -> torch.Tensor:
    """The sum over N of ``images`` [N, C, H, W], [H, W, C]: of int8 exact, else in float32.

    PyTorch is slow where it adds in another order than numbers lie in memory, or int8 into wider integers by itself.
    """
    if images.is_contiguous(memory_format=torch.channels_last):
        return _over_first(images.permute(0, 2, 3, 1))
    return _over_first(images.contiguous()).permute(1, 2, 0)


def _over_first(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.int8:
        return x.sum(0, dtype=torch.float32)
    if not 0 < len(x) <= _FIT_INT16:
        return x.sum(0, dtype=torch.int32)
    total = x[0].to(torch.int16)
    for each in x[1:]:
        total += each
    return total


def _product(weight: torch.Tensor, read: torch.Tensor, groups: int) -> torch.Tensor:
    """``weight`` OHWI times ``read`` [taps, groups, inputs of a group] -> [outputs]."""
    by_group = weight.view(groups, weight.shape[0] // groups, -1)
    return torch.bmm(by_group, read.transpose(0, 1).reshape(groups, -1, 1)).flatten()


def _read_by_taps(sums: torch.Tensor, layer: Int8ConvBnAct2d, pads: Any) -> tuple[torch.Tensor, int]:
    """What each tap of the window reads of ``sums`` [..., H, W, C] at all positions together, [..., taps, C], and how
    many positions there are.
    """
    top, bottom, left, right = pads
    (rows, columns), (down, across), (gap, gap_across) = layer._window, layer._stride, layer._dilation
    height = out_size(sums.shape[-3], rows, down, (top, bottom), gap)
    width = out_size(sums.shape[-2], columns, across, (left, right), gap_across)
    padded = F.pad(sums, (0, 0, left, right, top, bottom)) if any(pads) else sums
    found = []
    for i in range(rows):
        band = padded[..., i * gap : i * gap + (height - 1) * down + 1 : down, :, :].sum(-3)
        for j in range(columns):
            start = j * gap_across
            found.append(band[..., start : start + (width - 1) * across + 1 : across, :].sum(-2))
    return torch.stack(found, -2), height * width
