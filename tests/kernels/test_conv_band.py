"""Convolutions of float32 that a replay does together, some rows after the others, and depthwise ones alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.test_conv_cpu import ONE_TAP, check_float, needs_c, replayed
from tilewright.kernels.conv2d import cpu as float_cpu
from tilewright.kernels.conv2d import reference
from tilewright.kernels.cpu.replay import Replay

conv = torch.ops.tilewright.conv2d_fused


class Block:
    """A convolution to many channels, a depthwise one, and one by 1 x 1 with a residual where the sizes allow it.

    Between them lies more than a mebibyte, with which the kernel does them together.
    """

    def __init__(self, kernel: int, stride: int, first: int | None, last: bool = True, wide: int = 112) -> None:
        torch.manual_seed(0)
        self.stride, self.pad, self.first, self.last = stride, kernel // 2, first, last
        channels = 24
        self.expand = torch.randn(wide, first or 1, first or 1, channels if first else wide) / 5
        self.depth, self.project = torch.randn(wide, kernel, kernel, 1) / kernel, torch.randn(channels, 1, 1, wide) / 9
        self.bias, self.in_channels = torch.randn(wide), channels if first else wide

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y, sides = x, [self.pad] * 4
        if self.first:
            y = conv(y, self.expand, self.bias, None, [1, 1], [self.first // 2] * 4, [1, 1], 1, "relu6")
        y = conv(y, self.depth, self.bias, None, [self.stride] * 2, sides, [1, 1], len(self.depth), "relu6")
        residual = x if self.first == 1 and self.stride == 1 else None
        return conv(y, self.project, None, residual) if self.last else y

    def double(self, x: torch.Tensor) -> torch.Tensor:
        """The same in float64."""
        x = x.double()
        y, bias = x, self.bias.double()
        if self.first:
            sides = (self.first // 2,) * 4
            y = reference.conv2d_fused(y, self.expand.double(), bias, padding=sides, activation="relu6")
        rest: dict[str, Any] = {"stride": (self.stride,) * 2, "padding": (self.pad,) * 4, "groups": len(self.depth)}
        y = reference.conv2d_fused(y, self.depth.double(), bias, activation="relu6", **rest)
        if not self.last:
            return y
        y = reference.conv2d_fused(y, self.project.double())
        return y + x if self.first == 1 and self.stride == 1 else y


def picture(channels: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 53, 57, channels, generator=torch.Generator().manual_seed(1)).permute(0, 3, 1, 2)


def bands_of(replay: Replay) -> list[int]:
    return [step.band for part in replay.parts for step in part.steps if step.band]


BLOCKS = [(3, 1, 1, True), (3, 2, 1, True), (5, 2, 1, True), (3, 1, 1, False), (3, 1, None, True), (5, 1, 2, True)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kernel, stride, first, last", BLOCKS)
@torch.inference_mode()
def test_what_is_done_together_is_what_the_steps_give(
    isa: str, kernel: int, stride: int, first: int | None, last: bool, batch: int
) -> None:
    block = Block(kernel, stride, first, last)
    x = picture(block.in_channels, batch)
    fast, replay = replayed(block, x)
    assert bands_of(replay) == [1 + bool(first) + last]
    together = fast(x)
    torch.testing.assert_close(together.double(), block.double(x), rtol=2e-5, atol=2e-5)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(fast(x), together)
    finally:
        torch.set_num_threads(before)
    for part in replay.parts:
        for step in part.array:
            step.band = 0
    assert torch.equal(fast(x), together)


@torch.inference_mode()
def test_what_a_third_reads_is_written() -> None:
    needs_c()
    block = Block(3, 1, 1)

    def network(x: torch.Tensor) -> torch.Tensor:
        wide = conv(x, block.expand, block.bias)
        y = conv(wide, block.depth, None, None, [1, 1], [1] * 4, [1, 1], len(block.depth), "none")
        return conv(y, block.project) + wide.mean((2, 3), keepdim=True)[:, :24]

    x = picture(24)
    fast, replay = replayed(network, x)
    assert bands_of(replay) == [2]  # the last two: what the first makes is read twice
    torch.testing.assert_close(fast(x), network(x))


@torch.inference_mode()
def test_what_is_not_finite_stays_where_it_is(isa: str) -> None:
    block = Block(3, 1, 1)
    x = picture(24)
    fast, _ = replayed(block, x)
    clean = fast(x)
    x = x.clone()
    x[0, 3, 20, 30] = float("nan")
    y = fast(x)
    assert y[:, :, 19:22, 29:32].isnan().all()
    y[:, :, 19:22, 29:32] = clean[:, :, 19:22, 29:32]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("activation", ["relu6", "silu"])
def test_depthwise_is_as_good_as_pytorch(isa: str, kernel: int, stride: int, activation: str) -> None:
    """Widths around the four pixels that are done at once; few and many channels, ragged ones too."""
    needs_c()
    torch.manual_seed(0)
    for width, channels in ((3, 40), (4, 70), (7, 300), (9, 16), (30, 130)):
        window = {"kernel": (kernel,) * 2, "stride": (stride,) * 2, "padding": (kernel // 2,) * 4, "groups": channels}
        sizes = {**ONE_TAP, "batch": 2, "in_channels": channels, "out_channels": channels, "height": 5, "width": width}
        check_float(float_cpu.conv2d_fused, {**sizes, **window}, width == 7, activation)


@pytest.mark.parametrize("out_channels", [16, 24, 48, 80])
def test_tiles_of_all_sizes(isa: str, out_channels: int) -> None:
    """Sums in two segments; pixels at even distances and, with padding or stride, at others."""
    needs_c()
    torch.manual_seed(0)
    for pixels in range(1, 14):
        for window in ({}, {"padding": (1, 0, 1, 0)}, {"stride": (1, 2)}):
            x, weight = torch.randn(1, 2, pixels, 150).permute(0, 3, 1, 2), torch.randn(out_channels, 1, 1, 150)
            exact = reference.conv2d_fused(x.double(), weight.double(), torch.ones(out_channels).double(), **window)
            residual = torch.randn(exact.shape).contiguous(memory_format=torch.channels_last)
            y = float_cpu.conv2d_fused(x, weight, torch.ones(out_channels), **window)
            torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-4)
            y = float_cpu.conv2d_fused(x, weight, torch.ones(out_channels), residual, activation="relu", **window)
            torch.testing.assert_close(y.double(), (exact + residual).relu(), rtol=0, atol=1e-4)
