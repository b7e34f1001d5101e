"""Means of a convolution's results without computing them: sums of images, and what taps of a window read of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilewright.convert.network.means import _over_images, _read_by_taps
from tilewright.nn import Int8ConvBnAct2d

FORMATS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


@pytest.mark.parametrize("order", FORMATS)
@pytest.mark.parametrize("count", [1, 2, 8, 255, 256, 300])
def test_sums_of_codes_are_exact(count: int, order: str) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (count, 5, 3, 4), dtype=torch.int8)
    codes[:, 0], codes[:, 1] = -128, 127  # as far from zero as sums get
    found = _over_images(codes.to(memory_format=FORMATS[order]))
    assert torch.equal(found.long(), codes.long().sum(0).permute(1, 2, 0))


@pytest.mark.parametrize("order", FORMATS)
def test_sums_of_floats(order: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 5, 3, 4)
    found = _over_images(x.to(memory_format=FORMATS[order]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double().sum(0).permute(1, 2, 0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel, stride, dilation, pads", [(1, 1, 1, 0), (1, 2, 1, 0), (3, 1, 1, 1), (3, 2, 2, 3)])
def test_what_taps_read(kernel: int, stride: int, dilation: int, pads: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 4, kernel, stride, pads, dilation)
    layer = Int8ConvBnAct2d.from_float(conv, input_scale=0.1)
    x = torch.randn(5, 9, 11, dtype=torch.float64)
    found, positions = _read_by_taps(x.permute(1, 2, 0), layer, (pads,) * 4)
    windows = F.unfold(x.unsqueeze(0), kernel, dilation, pads, stride).squeeze(0).view(5, kernel**2, -1)
    assert positions == windows.shape[-1]
    torch.testing.assert_close(found, windows.sum(-1).t())
