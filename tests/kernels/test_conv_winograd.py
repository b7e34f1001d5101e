"""Winograd's algorithm in the C kernels: as good as PyTorch, also where sizes are ragged and values are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.test_conv_cpu import check_float, image, needs_c
from tests.tolerance import assert_close_as_plain
from tilewright.kernels.conv2d import cpu as float_cpu
from tilewright.kernels.conv2d import reference as float_reference
from tilewright.kernels.cpu import steps as conv_steps
from tilewright.kernels.cpu.replay import Replays

quick = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WINDOW = ((1, 1), (1, 1, 1, 1), (1, 1), 1)


def taken(x: torch.Tensor, weight: torch.Tensor, window: Any = WINDOW) -> bool:
    return conv_steps.packed_weight(weight, window[3], x.shape, window).kind == conv_steps.WINOGRAD


@quick
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from((32, 48, 128, 144, 512)),
    out_channels=st.sampled_from((16, 24, 32, 33, 72)),
    size=st.tuples(st.integers(8, 23), st.integers(8, 23)),
    padding=st.sampled_from(((1, 1, 1, 1), (0, 0, 0, 0), (2, 0, 0, 3), (1, 0, 2, 1))),
    residual=st.booleans(),
    activation=st.sampled_from(("none", "relu", "relu6", "silu", "leaky_relu")),
    threads=st.sampled_from((1, 2)),
    seed=st.integers(0, 99),
)
def test_it_is_as_good_as_pytorch(
    isa: str,
    batch: int,
    channels: int,
    out_channels: int,
    size: tuple[int, int],
    padding: tuple[int, ...],
    residual: bool,
    activation: str,
    threads: int,
    seed: int,
) -> None:
    needs_c()
    torch.manual_seed(seed)
    sizes = {"batch": batch, "in_channels": channels, "height": size[0], "width": size[1]}
    sizes |= {"out_channels": out_channels, "kernel": (3, 3), "padding": padding}
    sizes |= {"stride": (1, 1), "dilation": (1, 1), "groups": 1}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_float(float_cpu.conv2d_fused, sizes, residual, activation)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("channels", [32, 256, 1024])
def test_it_is_as_good_as_pytorch_on_what_a_relu_leaves(isa: str, channels: int) -> None:
    """Positive numbers add up to sums far from zero, whose differences are then taken."""
    needs_c()
    torch.manual_seed(0)

    for _ in range(3):
        x, weight = image(2, channels, 14, 14).relu(), torch.rand(32, 3, 3, channels)
        assert taken(x, weight)
        window = dict(zip(("stride", "padding", "dilation", "groups"), WINDOW, strict=True))
        exact = float_reference.conv2d_fused(x.double(), weight.double(), **window)
        y, plain = (module.conv2d_fused(x, weight, **window) for module in (float_cpu, float_reference))
        assert_close_as_plain(y, plain, exact)


def test_when_it_is_taken() -> None:
    needs_c()
    weight = torch.randn(64, 3, 3, 64)
    assert taken(image(1, 64, 14, 14), weight) and taken(image(8, 64, 7, 7), weight)
    assert not taken(image(1, 64, 1, 40), weight)  # half of each tile is outside the image
    assert not taken(image(1, 64, 2, 2), weight)
    assert not taken(image(1, 64, 14, 14), weight, ((2, 2), *WINDOW[1:]))
    assert not taken(image(1, 64, 14, 14), weight, (*WINDOW[:2], (2, 2), 1))
    assert not taken(image(1, 128, 14, 14), weight, (*WINDOW[:3], 2))
    assert not taken(image(1, 40, 14, 14), torch.randn(64, 3, 3, 40))
    assert not taken(image(1, 64, 14, 14), torch.randn(64, 3, 64, 3).transpose(2, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "minus inf"])
def test_what_is_not_finite_stays_in_its_windows(isa: str, value: float) -> None:
    """The neighbours in a tile do not look at it, and an infinity stays one."""
    needs_c()
    torch.manual_seed(0)
    x, weight, bias = image(2, 32, 13, 12), torch.rand(40, 3, 3, 32), torch.randn(40)
    x[1, 3, 5, 5] = value
    assert taken(x, weight)
    y = float_cpu.conv2d_fused(x, weight, bias, padding=(1, 1, 1, 1))
    expected = float_reference.conv2d_fused(x, weight, bias, padding=(1, 1, 1, 1))
    window = torch.zeros_like(y, dtype=torch.bool)
    window[1, :, 4:7, 4:7] = True
    assert torch.equal(~y.isfinite(), window) and torch.equal(~expected.isfinite(), window)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-4)


def test_sums_that_would_overflow_do_not(isa: str) -> None:
    """A difference of pixels of 3e38 has no float32, though all products with small weights add up to one."""
    needs_c()
    x = torch.full((1, 14, 14, 32), 3e38).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    x[:, :, ::2] *= -1
    weight = torch.zeros(16, 3, 3, 32)
    weight[:, 1] = 1e-3
    assert taken(x, weight)
    y = float_cpu.conv2d_fused(x, weight, padding=(1, 1, 1, 1))
    torch.testing.assert_close(y, float_reference.conv2d_fused(x, weight, padding=(1, 1, 1, 1)))


@torch.inference_mode()
def test_in_a_replay_the_weight_stays_as_long_as_it_is_read(isa: str) -> None:
    needs_c()
    weights = [torch.randn(64, 3, 3, 64) / 24]
    fast = Replays(lambda x: torch.ops.tilewright.conv2d_fused(x, weights[0], None, None, [1, 1], [1, 1, 1, 1]))
    x = image(1, 64, 14, 14)
    for _ in range(3):
        y = fast(x)
    assert fast.replays, fast.why_not
    torch.testing.assert_close(
        y, float_reference.conv2d_fused(x, weights[0], padding=(1, 1, 1, 1)), rtol=1e-4, atol=1e-4
    )
    x[0, 0, 7, 7] = float("nan")
    assert fast(x).isnan().sum() == 9 * 64
