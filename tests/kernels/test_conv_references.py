"""The definitions of the convolutions against NumPy in float64 and int64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bench.conv_problems import ConvShape, exact_before_rounding, make_conv_arguments, plain_result
from tests.kernels import exact_conv
from tests.tolerance import assert_close_as_plain
from tilewright.kernels.activation import CONV_ACTIVATIONS, apply_activation
from tilewright.kernels.conv2d.reference import conv2d_fused
from tilewright.kernels.conv_geometry import to_channels_last
from tilewright.kernels.int8_conv2d.reference import int8_conv2d_fused, marks_of, quantize_per_tensor

SMALL = st.integers(1, 3)


@st.composite
def shapes(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> ConvShape:
    """Any window that fits, any grouping."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    depthwise = draw(st.booleans())
    group_channels, group_outputs = 1 if depthwise else draw(SMALL), draw(SMALL)
    shape = ConvShape(
        batch=draw(st.integers(0, 2)),
        channels=groups * group_channels,
        size=(draw(st.integers(1, 7)), draw(st.integers(1, 7))),
        out_channels=groups * group_outputs,
        window=(draw(SMALL), draw(SMALL)),
        stride=(draw(SMALL), draw(SMALL)),
        padding=tuple(draw(st.integers(0, 2)) for _ in range(4)),
        dilation=(draw(SMALL), draw(SMALL)),
        groups=groups,
        dtype=draw(st.sampled_from(dtypes)),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(CONV_ACTIVATIONS)),
        zero_points=tuple(draw(st.sampled_from((0, -127, 3, 127))) for _ in range(3)),
    )
    for i in range(2):
        span = shape.dilation[i] * (shape.window[i] - 1) + 1
        assume(shape.size[i] + sum(shape.padding[2 * i : 2 * i + 2]) >= span)
    return shape


def is_channels_last(y: torch.Tensor) -> bool:
    _, c, h, w = y.shape
    return y.stride() == (h * w * c, 1, w * c, c)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(shape=shapes((torch.float16, torch.bfloat16, torch.float32, torch.float64)))
def test_the_float_convolution_is_that_of_numpy(shape: ConvShape) -> None:
    arguments = make_conv_arguments(shape)
    y = conv2d_fused(**arguments)
    assert is_channels_last(y)
    expected = exact_conv.conv2d_fused(arguments)
    if shape.dtype == torch.float64:
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    else:
        assert_close_as_plain(y, plain_result(arguments), expected)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(shape=shapes((torch.int8, torch.uint8)), quantized=st.booleans())
def test_the_int8_convolution_is_that_of_numpy(shape: ConvShape, quantized: bool) -> None:
    arguments = make_conv_arguments(shape)
    if not quantized:
        arguments |= {"out_scale": None, "out_dtype": torch.float32}
    y = int8_conv2d_fused(**arguments)
    assert is_channels_last(y)
    expected = exact_conv.int8_conv2d_fused(arguments)
    if quantized:
        exact_conv.assert_rounded(y, expected, arguments)
    else:
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(shape=shapes((torch.int8, torch.uint8)))
def test_integer_sums_are_exact(shape: ConvShape) -> None:
    arguments = make_conv_arguments(shape)
    arguments |= {"bias": None, "residual": None, "activation": "none", "x_scale": 1.0}
    arguments |= {"weight_scale": torch.ones(shape.out_channels), "out_scale": None, "out_dtype": torch.float32}
    x = exact_conv.integers(arguments["x"]) - arguments["x_zero_point"]
    total = exact_conv.sums(x, arguments["weight"].numpy().astype(np.int64), arguments)
    assert torch.equal(int8_conv2d_fused(**arguments), torch.from_numpy(total).float())


def test_extreme_sums_are_exact() -> None:
    x = torch.full((1, 600, 3, 3), 127, dtype=torch.int8)
    weight = torch.full((2, 3, 3, 600), 127, dtype=torch.int8)
    weight[1] = -127
    y = int8_conv2d_fused(x, 1.0, weight, torch.ones(2))
    assert y.flatten().tolist() == [127.0**2 * 5400, -(127.0**2) * 5400]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_the_exact_result_of_the_bench_is_that_of_numpy(dtype: torch.dtype) -> None:
    shape = ConvShape(2, 6, (7, 5), 9, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2), 3, dtype, residual=True, activation="silu")
    arguments = make_conv_arguments(shape)
    expected = getattr(exact_conv, shape.op)(arguments)
    torch.testing.assert_close(exact_before_rounding(shape.op, arguments), expected, rtol=1e-12, atol=1e-12)


# ---- sizes of zero
@pytest.mark.parametrize("batch, channels, outputs", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_sizes(batch: int, channels: int, outputs: int) -> None:
    arguments = make_conv_arguments(ConvShape(batch, channels, 5, outputs, 3, dtype=torch.float32))
    y = conv2d_fused(**arguments)
    assert y.shape == (batch, outputs, 5, 5)
    assert torch.equal(y, arguments["bias"].view(-1, 1, 1).expand(y.shape))
    arguments = make_conv_arguments(ConvShape(batch, channels, 5, outputs, 3, dtype=torch.int8))
    assert int8_conv2d_fused(**arguments).shape == (batch, outputs, 5, 5)


# ---- quantisation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (2, 3, 5), (2, 3, 5, 4), (2, 1, 5, 4)], ids=str)
def test_quantisation_is_that_of_numpy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 3).to(dtype)
    scale = 0.037
    steps = np.rint(x.float().numpy() / np.float32(scale)).clip(-127, 127).astype(np.int64)
    for out_dtype in (None, torch.int8, torch.uint8):
        q = quantize_per_tensor(x, scale, out_dtype)
        assert q.dtype == (out_dtype or torch.int8)
        assert np.array_equal(exact_conv.integers(q), steps)
        assert q.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def test_ties_go_to_even_and_what_is_not_finite_to_an_integer() -> None:
    x = torch.tensor([0.5, 1.5, -0.5, -2.5, 126.5, 127.5, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])
    assert quantize_per_tensor(x, 1.0).tolist() == [0, 2, 0, -2, 126, 127, 127, -127, 127, -127, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_marks_are_of_what_is_not_finite(bad: float, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for shape in ((), (3,), (5, 3), (2, 3, 4, 5)):
        for place in range(torch.Size(shape).numel()):
            x = torch.full(shape, -largest, dtype=dtype)
            x.view(-1)[place] = bad
            for sample_dims in range(max(x.dim(), 1)):
                marks = marks_of(x, sample_dims)
                assert (marks.shape, marks.dtype) == (x.shape[:sample_dims], torch.float32)
                index = np.unravel_index(place, shape)[:sample_dims]
                assert torch.isnan(marks).sum() == 1 and torch.isnan(marks[tuple(map(int, index))])
                assert torch.equal(marks.nan_to_num(0.0), torch.zeros_like(marks))
    assert torch.equal(marks_of(torch.empty(3, 0, 2), 1), torch.zeros(3))


@pytest.mark.parametrize("activation", ["leaky_relu", "relu6", "hardswish"])
def test_new_activations_keep_nan(activation: str) -> None:
    x = torch.cat([torch.linspace(-9, 9, 999, dtype=torch.float64), torch.tensor([torch.nan])])
    arguments: dict[str, Any] = {"activation": activation, "negative_slope": 0.3}
    actual, expected = apply_activation(x, activation, negative_slope=0.3), exact_conv.activate(x.numpy(), arguments)
    assert np.allclose(actual.numpy(), expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("shape", [(2, 1, 5, 4), (2, 3, 1, 1), (1, 1, 1, 1), (0, 3, 2, 2), (2, 3, 4, 5)], ids=str)
def test_channels_last_has_one_set_of_strides(shape: tuple[int, ...]) -> None:
    for y in (torch.randn(shape), torch.randn(shape).to(memory_format=torch.channels_last)):
        assert is_channels_last(to_channels_last(y))
        assert torch.equal(to_channels_last(y), y)
