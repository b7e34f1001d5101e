"""Rung 7: the convolutions on a GPU, every family and the quantiser against the definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.conv_problems import (
    INTEGERS,
    ConvShape,
    exact_before_rounding,
    make_conv_arguments,
    plain_result,
    reference_result,
)
from tests.kernels.exact_conv import assert_rounded
from tests.tolerance import assert_close_as_plain
from tilewright.kernels.int8_conv2d.reference import quantize_per_tensor

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8], ids=lambda d: str(d)[6:]
)
SHAPES = {
    "1 x 1": ConvShape(4, 64, 28, 256),
    "1 x 1 strided": ConvShape(2, 40, (27, 9), 33, stride=(2, 3)),
    "3 x 3": ConvShape(4, 64, 28, 64, 3),
    "3 x 3 deep": ConvShape(1, 1024, 7, 256, 3),
    "3 x 3 wide": ConvShape(32, 256, 28, 256, 3),
    "odd": ConvShape(2, 18, (7, 5), 21, (3, 2), (3, 2), (1, 0, 2, 1), (2, 1), groups=3),
    "grouped": ConvShape(2, 64, 14, 64, 3, groups=8),
    "stem": ConvShape(2, 3, 65, 64, 7, 2),
    "one channel": ConvShape(2, 1, (7, 5), 1, 3),
    "depthwise": ConvShape(2, 72, 29, 72, 5, 2, groups=72),
    "depthwise times two": ConvShape(2, 9, (7, 5), 18, 3, groups=9),
    "no images": ConvShape(0, 16, 7, 16, 3),
}
EACH_SHAPE = pytest.mark.parametrize("name", SHAPES)


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def call(op: str, arguments: dict[str, Any]) -> torch.Tensor:
    return getattr(torch.ops.tilewright, op)(**arguments)


@EACH_SHAPE
@DTYPES
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_against_float64(name: str, dtype: torch.dtype, activation: str) -> None:
    zero_points = (-127, 40, -9) if activation != "none" and dtype in INTEGERS else (0, 0, 0)
    shape = replace(SHAPES[name], dtype=dtype, residual=activation != "none", activation=activation)
    shape = replace(shape, zero_points=zero_points)
    arguments = make_conv_arguments(shape)
    y = call(shape.op, on_gpu(arguments))
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = exact_before_rounding(shape.op, arguments)
    if dtype in INTEGERS:
        assert_rounded(y.cpu(), exact, arguments)
    else:
        assert_close_as_plain(y.cpu(), plain_result(arguments), exact)


@EACH_SHAPE
def test_integer_sums_are_exact(name: str) -> None:
    shape = replace(SHAPES[name], dtype=torch.int8, out_dtype=torch.float32, bias=False)
    arguments = make_conv_arguments(shape)
    assert torch.equal(call(shape.op, on_gpu(arguments)).cpu(), reference_result(shape.op, arguments))


@EACH_SHAPE
@DTYPES
def test_a_run_repeats_bit_for_bit_in_any_memory_order(name: str, dtype: torch.dtype) -> None:
    shape = replace(SHAPES[name], dtype=dtype, residual=True)
    arguments = on_gpu(make_conv_arguments(shape))
    first = call(shape.op, arguments)
    wide = torch.zeros((*arguments["x"].shape[:3], 2 * arguments["x"].shape[3]), dtype=dtype, device="cuda")
    wide[..., ::2] = arguments["x"]
    for x in (arguments["x"], arguments["x"].contiguous(), wide[..., ::2]):
        assert torch.equal(call(shape.op, arguments | {"x": x}), first)


@pytest.mark.parametrize("shape", [(2, 64, 9, 7), (5,), (3, 0, 2, 2), (2, 3, 5)], ids=str)
def test_quantisation_agrees_to_the_bit(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = (torch.randn(shape) * 3).to(dtype)
        x.view(-1)[: min(3, x.numel())] = torch.tensor([torch.nan, torch.inf, -torch.inf])[: min(3, x.numel())]
        for out_dtype in INTEGERS:
            for zero_point in (0, -127):
                q = torch.ops.tilewright.quantize_per_tensor(x.cuda(), 0.017, out_dtype, zero_point)
                assert torch.equal(q.cpu(), quantize_per_tensor(x, 0.017, out_dtype, zero_point))
