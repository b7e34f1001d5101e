"""The convolution kernels in the interpreter, every family and both forms of loop, float and int8.

Warps mean nothing to the interpreter; the emulator runs four and eight (tests/kernels/test_emulated_conv.py).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.conv_catalogue import CONV_FAMILIES, make_call
from bench.conv_problems import (
    INTEGERS,
    ConvShape,
    exact_before_rounding,
    make_conv_arguments,
    plain_result,
    reference_result,
)
from tests.interpreter.guard_page import guarded, survives
from tests.kernels.exact_conv import assert_rounded
from tests.tolerance import assert_close_as_plain
from tilewright.kernels.activation import CONV_ACTIVATIONS
from tilewright.kernels.conv2d import triton_depthwise, triton_implicit, triton_pointwise, triton_stem
from tilewright.kernels.conv2d.triton_launch import ConvTile
from tilewright.kernels.int8_conv2d import reference, triton_quantize

TILES = {
    "small": ConvTile(16, 16, 16, 1, 4, 1),
    "two parts": ConvTile(32, 32, 32, 2, 4, 1),
    "four parts": ConvTile(16, 64, 32, 4, 4, 1),
}
MODULES = {
    "pointwise": triton_pointwise,
    "taps": triton_implicit,
    "flat": triton_implicit,
    "stem": triton_stem,
    "depthwise": triton_depthwise,
}
PLANS = {
    "pointwise": triton_pointwise.plan_pointwise,
    "taps": lambda call, tile: triton_implicit.plan_implicit(call, triton_implicit.ImplicitConfig(tile, False)),
    "flat": lambda call, tile: triton_implicit.plan_implicit(call, triton_implicit.ImplicitConfig(tile, True)),
    "stem": lambda call, tile: triton_stem.plan_stem(call, replace(tile, block_k=32, epilogue_parts=1)),
    "depthwise": lambda call, tile: triton_depthwise.plan_depthwise(
        call, triton_depthwise.DepthwiseConfig(tile.block_m, tile.block_n, 4)
    ),
}
#: Every size a multiple of the smallest tile, and none of anything.
EVEN = {
    "pointwise": ConvShape(1, 32, (4, 8), 64),
    "taps": ConvShape(1, 32, (4, 8), 64, (1, 2), padding=(0, 0, 0, 1)),
    "stem": ConvShape(1, 4, (8, 16), 64, 2, 2, padding=(0, 0, 0, 0)),
    "depthwise": ConvShape(1, 16, (4, 8), 16, 3, groups=16),
}
ODD = {
    "pointwise": ConvShape(2, 19, (7, 5), 21, stride=(2, 3)),
    "taps": ConvShape(2, 18, (7, 5), 21, (3, 2), (3, 2), (1, 0, 2, 1), (2, 1), groups=3),
    "stem": ConvShape(2, 3, (7, 5), 21, 3, 2, dilation=(2, 1)),
    "depthwise": ConvShape(2, 5, (7, 5), 10, (3, 2), (3, 1), (1, 0, 2, 1), (2, 1), groups=5),
}
for _shapes in (EVEN, ODD):
    _shapes["flat"] = _shapes["taps"]
EACH_FAMILY = pytest.mark.parametrize("family", PLANS)
#: Of x, of the residual, of the result.
ZERO_POINTS = (-127, 40, -9)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8, torch.uint8], ids=str)


def run(family: str, shape: ConvShape, tile: ConvTile = TILES["small"]) -> torch.Tensor:
    call = make_call(shape)
    for launch in PLANS[family](call, tile):
        launch.run()
    return call.result


def check(y: torch.Tensor, shape: ConvShape, **changes: Any) -> None:
    arguments = make_conv_arguments(shape) | changes
    exact = exact_before_rounding(shape.op, arguments)
    if y.dtype in INTEGERS:
        assert_rounded(y, exact, arguments)
    elif shape.dtype in INTEGERS:
        assert_close_as_plain(y, reference_result(shape.op, arguments), exact)
    else:
        assert_close_as_plain(y, plain_result(arguments), exact)


@EACH_FAMILY
@DTYPES
@pytest.mark.parametrize("tile", TILES)
def test_every_tile(family: str, dtype: torch.dtype, tile: str) -> None:
    for shapes in (EVEN, ODD):
        shape = replace(shapes[family], dtype=dtype, residual=True, activation="silu")
        check(run(family, shape, TILES[tile]), shape)
        if dtype in INTEGERS:
            shape = replace(shape, zero_points=ZERO_POINTS)
            check(run(family, shape, TILES[tile]), shape)


@EACH_FAMILY
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_sums_are_exact(family: str, dtype: torch.dtype) -> None:
    """Without bias and activation both compute one expression in float32, so nothing may differ."""
    for zero_points in ((0, 0, 0), ZERO_POINTS):
        shape = replace(ODD[family], dtype=dtype, out_dtype=torch.float32, bias=False, zero_points=zero_points)
        assert torch.equal(run(family, shape), reference_result(shape.op, make_conv_arguments(shape)))


@pytest.mark.parametrize("activation", CONV_ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8], ids=str)
def test_every_activation(activation: str, dtype: torch.dtype) -> None:
    shape = replace(ODD["pointwise"], dtype=dtype, residual=True, activation=activation)
    if dtype == torch.int8:
        shape = replace(shape, out_dtype=torch.float32)
    arguments = make_conv_arguments(shape)
    arguments["bias"] *= 8  # into the range where activations bend, and beyond
    arguments["bias"][0] = -200
    function = getattr(triton_pointwise, shape.op)
    check(function(**arguments), shape, bias=arguments["bias"])


@EACH_FAMILY
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_value_that_is_not_finite_marks_the_windows_that_see_it_and_no_other(family: str, bad: float) -> None:
    shape = replace(ODD[family], dtype=torch.float16, activation="relu6")
    arguments = make_conv_arguments(shape)
    clean = reference_result(shape.op, arguments)
    arguments["x"][1, 0, 3, 2] = bad
    y = getattr(MODULES[family], shape.op)(**arguments)
    expected = reference_result(shape.op, arguments)
    seen = expected.isnan() | (expected != clean)
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y[~seen], clean[~seen], rtol=2e-3, atol=2e-3)
    if bad != bad:
        assert y[1].isnan().any() == bool(seen.any()) and not y[0].isnan().any()


@EACH_FAMILY
def test_any_memory_order(family: str) -> None:
    shape = replace(ODD[family], dtype=torch.float32, residual=True)
    arguments = make_conv_arguments(shape)
    expected = reference_result(shape.op, arguments)
    x, residual, bias = arguments["x"], arguments["residual"], arguments["bias"]
    function = getattr(MODULES[family], shape.op)
    wide = torch.full((4, x.shape[1] + 3, x.shape[2] + 1, 2 * x.shape[3]), torch.nan)
    wide = wide.contiguous(memory_format=torch.channels_last)
    wide[::2, 1 : 1 + x.shape[1], 1:, ::2] = x
    others = {
        "residual": residual.contiguous(),
        "bias": bias.repeat_interleave(2)[::2],
        "weight": arguments["weight"].permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }
    for view in (x.contiguous(), wide[::2, 1 : 1 + x.shape[1], 1:, ::2], x.flip(3).flip(3)):
        y = function(**arguments | others | {"x": view})
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected)


@EACH_FAMILY
def test_no_images_and_one_pixel(family: str) -> None:
    for changes in ({"batch": 0}, {"batch": 1, "size": 1, "window": 1, "padding": None, "stride": 1}):
        shape = replace(ODD[family], dtype=torch.float32, **changes)
        arguments = make_conv_arguments(shape)
        expected = reference_result(shape.op, arguments)
        y = getattr(MODULES[family], shape.op)(**arguments)
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
        torch.testing.assert_close(y, expected)


@EACH_FAMILY
@DTYPES
def test_nothing_outside_the_tensors_is_touched(family: str, dtype: torch.dtype) -> None:
    zero_points = ZERO_POINTS if dtype == torch.int8 else (0, 0, 0)
    call = make_call(replace(ODD[family], dtype=dtype, residual=True, zero_points=zero_points))
    names = ("x", "weight", "out", "bias", "residual", "weight_scale", "weight_sum")
    tensors = {name: getattr(call, name) for name in names}
    call = replace(call, **{name: None if t is None else guarded(t) for name, t in tensors.items()})
    launches = PLANS[family](call, TILES["small"])
    assert survives(lambda: [launch.run() for launch in launches])


def test_offsets_may_pass_two_to_the_31() -> None:
    """The second image begins beyond 2^31; the pages between are never touched, so they cost nothing."""
    gap = 2**31 + 64
    memory = torch.empty(gap + 4096, dtype=torch.int8)
    for family in PLANS:
        shape = replace(ODD[family], dtype=torch.int8)
        arguments = make_conv_arguments(shape)
        x = arguments["x"]
        far = torch.as_strided(memory, x.shape, (gap, *x.stride()[1:])).copy_(x)
        y = getattr(MODULES[family], shape.op)(**arguments | {"x": far})
        assert torch.equal(y, getattr(MODULES[family], shape.op)(**arguments))


def test_a_weight_written_anew_is_padded_anew() -> None:
    for family in ("stem", "depthwise"):
        shape = replace(ODD[family], dtype=torch.float32)
        arguments = make_conv_arguments(shape)
        function = getattr(MODULES[family], shape.op)
        function(**arguments)
        arguments["weight"].mul_(-2)
        torch.testing.assert_close(function(**arguments), reference_result(shape.op, arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_quantisation_agrees_to_the_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 5, 7, 3, generator=generator).to(dtype)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 6e4, -0.0, 0.0085, 0.0255], dtype=dtype)
    channels_last = image.contiguous(memory_format=torch.channels_last)
    for x in (image, channels_last, image[:, 1:3, ::2], image.flatten()[:-1], image[0, 0].t(), special, image[:0]):
        for out_dtype, zero_point in itertools.product((None, torch.uint8), (0, -127, 30)):
            q, expected = (
                f(x, 0.017, out_dtype, zero_point)
                for f in (triton_quantize.quantize_per_tensor, reference.quantize_per_tensor)
            )
            assert torch.equal(q, expected)
            assert (q.dtype, q.stride()) == (expected.dtype, expected.stride())
            for sample_dims in range(min(x.dim(), 2)):
                q, marks = triton_quantize.quantize_per_tensor_marked(x, 0.017, sample_dims, out_dtype, zero_point)
                assert torch.equal(q, expected)
                assert torch.equal(marks.isnan(), x.isfinite().logical_not().flatten(sample_dims).any(-1))


def test_every_family_of_the_catalogue_is_here() -> None:
    assert {module.why_not for module in MODULES.values()} == {family.why_not for family in CONV_FAMILIES.values()}


def test_an_unknown_activation_is_named() -> None:
    arguments = make_conv_arguments(replace(ODD["pointwise"], dtype=torch.float32, activation="swish"))
    with pytest.raises(ValueError, match="'swish' is unknown"):
        triton_pointwise.conv2d_fused(**arguments)
