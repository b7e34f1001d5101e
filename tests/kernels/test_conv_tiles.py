"""Shapes at the edges of int8 kernels: tiles that are not full, windows that are copied, columns that are shared."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.test_conv_cpu import ONE_TAP, image, int8_arguments, needs_c
from tilewright.kernels.conv_geometry import ConvGeometry
from tilewright.kernels.cpu import steps as conv_steps
from tilewright.kernels.cpu.recording import recorded
from tilewright.kernels.cpu.replay import Replays
from tilewright.kernels.int8_conv2d import cpu as int8_cpu
from tilewright.kernels.int8_conv2d import reference as int8_reference


def check(sizes: dict[str, Any], x_type: str = "int8", threads: int = 1, **options: Any) -> None:
    """The kernels give the definition's bits. x_type: int8, uint8, or nonnegative, which is int8 too."""
    dtype = torch.uint8 if x_type == "uint8" else torch.int8
    if x_type == "nonnegative":
        options |= {"x_nonnegative": True}
    elif "x_zero_point" not in options:
        options |= {"x_zero_point": -3}
    sizes = {**ONE_TAP, **sizes}
    geometry = ConvGeometry(**sizes)
    options.setdefault("out_scale", 0.02 * (geometry.taps * geometry.group_channels) ** 0.5)
    arguments = int8_arguments(sizes, dtype, options.pop("residual", None), **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = int8_cpu.int8_conv2d_fused(**arguments)
    finally:
        torch.set_num_threads(before)
    expected = int8_reference.int8_conv2d_fused(**arguments)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert found.numel() < 100 or found.unique().numel() > 5, "nothing was tested"


#: Few pixels are multiplied by vectors, 16 and 32 fill tiles, and one more needs another.
@pytest.mark.parametrize("pixels", [1, 7, 8, 16, 17, 32, 33, 49])
@pytest.mark.parametrize("x_type", ["int8", "uint8", "nonnegative"])
def test_one_by_one_with_any_number_of_pixels(isa: str, pixels: int, x_type: str) -> None:
    needs_c()
    torch.manual_seed(0)
    for threads in (1, 2, 3):
        check({"batch": 1, "in_channels": 64, "height": 1, "width": pixels, "out_channels": 64}, x_type, threads)


#: 96 channels are cut into even rows of 48 bytes, 148 and 20 into none: those are copied and followed by zeros.
@pytest.mark.parametrize("channels", [4, 16, 20, 24, 30, 96, 148, 192])
@pytest.mark.parametrize("out_channels", [1, 16, 17, 48, 100])
def test_channels_that_fill_no_tile(isa: str, channels: int, out_channels: int) -> None:
    needs_c()
    torch.manual_seed(0)
    sizes = {"batch": 2, "in_channels": channels, "height": 5, "width": 7, "out_channels": out_channels}
    check(sizes)
    check(sizes, threads=2, residual="int8", activation="relu")
    check({**sizes, "kernel": (3, 3), "padding": (1, 1, 1, 1)}, "uint8", residual="float", activation="hardswish")


@pytest.mark.parametrize(
    "window",
    [
        {"kernel": (3, 3), "padding": (1, 1, 1, 1)},
        {"kernel": (3, 3), "padding": (1, 1, 1, 1), "stride": (2, 2)},
        {"kernel": (3, 3), "padding": (2, 2, 2, 2), "dilation": (2, 2)},
        {"kernel": (3, 3), "padding": (0, 1, 0, 1), "groups": 2},
        {"kernel": (1, 1), "stride": (2, 2)},
        {"kernel": (1, 1), "padding": (1, 0, 2, 1)},
        {"kernel": (1, 1), "groups": 4},
        {"kernel": (2, 5), "padding": (1, 0, 2, 2)},
    ],
    ids=str,
)
def test_windows_of_tiles(isa: str, window: dict[str, Any]) -> None:
    needs_c()
    torch.manual_seed(0)
    sizes = {"batch": 2, "in_channels": 80, "height": 9, "width": 11, "out_channels": 96, **window}
    for threads, zero_point in ((1, 0), (2, 11), (3, -127)):
        check(sizes, threads=threads, x_zero_point=zero_point, activation="relu6")


def test_windows_of_few_channels_are_followed_by_zeros(isa: str) -> None:
    """In the memory that they are copied to something else lay before."""
    needs_c()
    torch.manual_seed(0)
    window = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}
    before = {"batch": 1, "in_channels": 64, "height": 8, "width": 8, "out_channels": 32, **window}
    for channels in (1, 3, 6):
        check(before)
        check({**before, "in_channels": channels, "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3, 3, 3)})


@pytest.mark.parametrize("kernel, size", [(1, 104), (3, 35)])
def test_more_pixels_than_a_block_has(isa: str, kernel: int, size: int) -> None:
    needs_c()
    torch.manual_seed(0)
    sizes = {"batch": 1, "in_channels": 64, "height": size, "width": size, "out_channels": 80}
    check({**sizes, "kernel": (kernel, kernel), "padding": (kernel // 2,) * 4})


def test_pixels_that_are_parts_of_others(isa: str) -> None:
    """The image and the result are some of the channels of larger ones."""
    needs_c()
    torch.manual_seed(0)
    x, y = image(1, 160, 6, 6, dtype=torch.int8)[:, 32:96], image(1, 96, 6, 6, dtype=torch.int8)
    untouched, part = y.clone(), y[:, 16:80]
    arguments = int8_arguments(
        {**ONE_TAP, "batch": 1, "in_channels": 64, "height": 6, "width": 6, "out_channels": 64},
        torch.int8,
        None,
        out_scale=0.2,
    )
    arguments |= {"x": x}
    packed = conv_steps.packed_weight(arguments["weight"], 1)
    convolution = conv_steps.convolution(
        arguments["weight"], arguments["bias"], weight_scale=arguments["weight_scale"], x_scale=0.02, out_scale=0.2
    )
    description = conv_steps.describe_conv(x, part, packed, convolution)
    conv_steps.run(description)
    assert torch.equal(part, int8_reference.int8_conv2d_fused(**arguments))
    assert torch.equal(y[:, :16], untouched[:, :16]) and torch.equal(y[:, 80:], untouched[:, 80:])


@pytest.mark.parametrize("channels", [2, 16, 32, 63, 64, 65, 144])
@pytest.mark.parametrize(
    "window",
    [
        {"padding": (1, 1, 1, 1)},
        {"padding": (1, 1, 1, 1), "stride": (2, 2)},
        {"padding": (0, 0, 0, 0)},
        {"padding": (2, 1, 0, 2), "stride": (1, 3)},
        {"padding": (2, 2, 2, 2), "dilation": (2, 2)},
        {"padding": (1, 1, 2, 2), "dilation": (1, 2), "stride": (1, 2)},
    ],
    ids=str,
)
def test_depthwise_columns(isa: str, channels: int, window: dict[str, Any]) -> None:
    needs_c()
    torch.manual_seed(0)
    for height, width, threads in ((5, 5, 1), (6, 9, 2), (7, 5, 3)):
        sizes = {"batch": 2, "in_channels": channels, "height": height, "width": width, "out_channels": channels}
        sizes |= {"kernel": (3, 3), "groups": channels, **window}
        check(sizes, threads=threads, activation="relu6")
        check(sizes, "uint8", threads, residual="int8", activation="relu")
        check(sizes, "nonnegative", threads, activation="hardswish", out_dtype=torch.uint8)


def test_a_scale_without_a_reciprocal(isa: str) -> None:
    """1 / scale is infinite, and so no product with it stands for a quotient."""
    needs_c()
    x, weight = image(1, 32, 4, 4, dtype=torch.int8), torch.randint(-2, 3, (32, 1, 1, 32)).char()
    arguments = {"x": x, "x_scale": 1.0, "weight": weight, "weight_scale": torch.full((32,), 1e-39)}
    arguments |= {"out_scale": 1e-39, "activation": "relu"}
    assert torch.equal(int8_cpu.int8_conv2d_fused(**arguments), int8_reference.int8_conv2d_fused(**arguments))


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish"])
@pytest.mark.parametrize("zero_point", [0, -127, 19])
def test_integers_that_are_rounded_with_one_multiplication(isa: str, activation: str, zero_point: int) -> None:
    """Among so many some lie so close to the middle between two that they must be divided."""
    needs_c()
    torch.manual_seed(0)
    sizes = {"batch": 1, "in_channels": 32, "height": 40, "width": 40, "out_channels": 96}
    for residual in (None, "int8"):
        options = {"activation": activation, "out_zero_point": zero_point, "out_scale": 0.031, "residual": residual}
        check(sizes, **options)
        depthwise = {**sizes, "in_channels": 96, "groups": 96, "kernel": (3, 3), "padding": (1, 1, 1, 1)}
        check(depthwise, **options)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_quotients_in_the_middle_between_two_integers(isa: str, activation: str) -> None:
    """Scales that are powers of two: a quarter of the results lie right there."""
    needs_c()
    torch.manual_seed(0)
    sizes = {**ONE_TAP, "batch": 1, "in_channels": 64, "height": 8, "width": 8, "out_channels": 64}
    for zero_point in (0, 1):
        arguments = int8_arguments(sizes, torch.int8, "int8", activation=activation, out_zero_point=zero_point)
        arguments |= {"x_scale": 2.0**-7, "weight_scale": torch.full((64,), 2.0**-8), "residual_scale": 2.0**-3}
        arguments |= {"bias": torch.randint(-9, 9, (64,)) * 0.125, "out_scale": 0.25}
        arguments["x"] = arguments["x"] // 32
        found, expected = (each.int8_conv2d_fused(**arguments) for each in (int8_cpu, int8_reference))
        assert torch.equal(found, expected) and found.unique().numel() > 20


@pytest.mark.parametrize("damage", ["bias", "scale", "residual scale"])
def test_factors_that_are_infinite(isa: str, damage: str) -> None:
    needs_c()
    torch.manual_seed(0)
    sizes = {**ONE_TAP, "batch": 1, "in_channels": 64, "height": 6, "width": 6, "out_channels": 64}
    arguments = int8_arguments(sizes, torch.int8, "int8", out_scale=1e-3)
    if damage == "bias":
        arguments["bias"][::3], arguments["bias"][1::3] = 3e38, -3e38
    elif damage == "scale":
        arguments["weight_scale"][::3] = 3e36
        arguments["bias"][::6] = -3e38
    else:
        arguments["residual_scale"] = 3e37
    found, expected = (each.int8_conv2d_fused(**arguments) for each in (int8_cpu, int8_reference))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("channels", [3, 16, 64, 70, 144])
def test_products_with_a_gate_are_quantised_at_once(isa: str, channels: int) -> None:
    """As two steps would: integers, marks, NaN and infinity."""
    needs_c()
    torch.manual_seed(0)

    def gated(x: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.tilewright.quantize_per_tensor_marked(torch.relu(x) * torch.relu(gate), 0.02, 1, zero_point=-7)

    x, gate = image(3, channels, 9, 7), torch.randn(3, channels, 1, 1)
    fast = Replays(gated)
    with torch.no_grad():
        for _ in range(3):
            fast(x, gate)
        assert fast.replays, fast.why_not
        (part,) = fast.replays[0].parts
        product = part.steps[-1]
        assert product.kind == conv_steps.MULTIPLY and product.y_type == conv_steps.INT8
        for bad in (0.0, float("nan"), float("inf"), 3e38):
            x[1, channels // 2, 4, 4] = bad
            for found, expected in zip(fast(x, gate * 10), gated(x, gate * 10), strict=True):
                assert torch.equal(found.isnan(), expected.isnan())
                assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("channels", [1, 16, 63, 64, 65])
def test_the_largest_of_a_window(isa: str, channels: int) -> None:
    needs_c()
    torch.manual_seed(0)

    @recorded("max_pool")
    def pool(q: torch.Tensor, *window: int) -> torch.Tensor:
        return F.max_pool2d(q.float(), *window).to(torch.int8)

    for window in ((3, 2, 1), (2, 2, 0), (3, 1, 1)):
        fast, q = Replays(functools.partial(_called_with, pool, window)), image(2, channels, 9, 11, dtype=torch.int8)
        with torch.no_grad():
            for _ in range(3):
                fast(q)
            assert fast.replays, fast.why_not
            q = image(2, channels, 9, 11, dtype=torch.int8)
            assert torch.equal(fast(q), F.max_pool2d(q.float(), *window).to(torch.int8))


def _called_with(function: Callable[..., torch.Tensor], more: tuple[int, ...], q: torch.Tensor) -> torch.Tensor:
    return function(q, *more)
