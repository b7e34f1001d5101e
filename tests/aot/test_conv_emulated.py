"""Rung 5: the convolution kernels' PTX executed, at four and eight warps: results, bounds, races, unwritten memory.

Each family runs on both architectures: half precision and offset bytes on sm_80, bfloat16 and int8 on sm_90, where the
instruction is another. Sizes are multiples of nothing, and outputs are poisoned.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton cannot be imported here")

from bench.conv_catalogue import make_call
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
from tilewright.aot import emulate_launch
from tilewright.aot.launch import Launch
from tilewright.kernels.conv2d.triton_depthwise import DepthwiseConfig, plan_depthwise
from tilewright.kernels.conv2d.triton_implicit import ImplicitConfig, plan_implicit
from tilewright.kernels.conv2d.triton_launch import ConvCall, ConvTile
from tilewright.kernels.conv2d.triton_pointwise import plan_pointwise
from tilewright.kernels.conv2d.triton_stem import plan_stem
from tilewright.kernels.int8_conv2d import reference
from tilewright.kernels.int8_conv2d.triton_quantize import plan_quantize_per_tensor

pytestmark = pytest.mark.aot

TILES = {4: ConvTile(64, 32, 32, 1, 4, 3), 8: ConvTile(128, 64, 32, 2, 8, 3)}
WINDOW = {"window": (2, 2), "stride": (2, 1), "padding": (1, 0, 2, 1), "dilation": (1, 2)}
SHAPES = {
    "pointwise": ConvShape(2, 40, (7, 9), 72),
    "pointwise strided": ConvShape(2, 64, (7, 9), 33, stride=(2, 3)),
    "taps": ConvShape(2, 40, (7, 5), 72, **WINDOW),
    "flat": ConvShape(2, 64, (7, 5), 72, **WINDOW),
    "taps grouped": ConvShape(1, 24, (7, 5), 15, **WINDOW, groups=3),
    "flat grouped": ConvShape(1, 24, (7, 5), 15, **WINDOW, groups=3),
    "stem": ConvShape(2, 3, (17, 11), 40, 5, 2),
    "depthwise": ConvShape(1, 40, (7, 9), 40, 3, groups=40),
}


def plan(family: str, call: ConvCall, warps: int) -> list[Launch]:
    tile, kind = TILES[warps], family.split()[0]
    if kind in ("taps", "flat"):
        return plan_implicit(call, ImplicitConfig(tile, kind == "flat"))
    if kind == "depthwise":
        return plan_depthwise(call, DepthwiseConfig(8 * warps, 64, warps))
    return plan_stem(call, replace(tile, epilogue_parts=1)) if kind == "stem" else plan_pointwise(call, tile)


def emulate(family: str, shape: ConvShape, warps: int, target: str) -> torch.Tensor:
    call = make_call(shape)
    for launch in plan(family, call, warps):
        emulate_launch(launch, target)
    return call.result


@pytest.mark.parametrize(
    "target, dtype",
    [("sm_80", torch.float16), ("sm_80", torch.uint8), ("sm_90", torch.bfloat16), ("sm_90", torch.int8)],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize(
    "family, warps",
    [(family, 4) for family in SHAPES] + [("pointwise", 8), ("taps", 8), ("flat", 8), ("stem", 8)],
)
def test_families(family: str, target: str, dtype: torch.dtype, warps: int) -> None:
    shape = replace(SHAPES[family], dtype=dtype, residual=True, activation="hardswish" if warps == 4 else "leaky_relu")
    arguments = make_conv_arguments(shape)
    y = emulate(family, shape, warps, target)
    exact = exact_before_rounding(shape.op, arguments)
    if dtype in INTEGERS:
        assert_rounded(y, exact, arguments["out_scale"])
    else:
        assert_close_as_plain(y, plain_result(arguments), exact)


@pytest.mark.parametrize("family", ["pointwise", "flat"])
def test_integer_sums_are_exact(family: str) -> None:
    shape = replace(SHAPES[family], dtype=torch.int8, out_dtype=torch.float32, bias=False)
    y = emulate(family, shape, 4, "sm_90")
    assert torch.equal(y, reference_result(shape.op, make_conv_arguments(shape)))


def test_offset_bytes_go_through_registers_unharmed_on_sm_90() -> None:
    """There the left operand of wgmma comes from registers, which must not change while it runs: five steps long."""
    shape = replace(SHAPES["pointwise"], channels=160, dtype=torch.uint8, out_dtype=torch.float32, bias=False)
    y = emulate("pointwise", shape, 4, "sm_90")
    assert torch.equal(y, reference_result(shape.op, make_conv_arguments(shape)))


@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_float32_is_rounded_to_tf32_on_request_alone(target: str, tf32: bool) -> None:
    shape = replace(SHAPES["flat"], dtype=torch.float32, allow_tf32=tf32)
    arguments = make_conv_arguments(shape)
    y, exact = emulate("flat", shape, 4, target), exact_before_rounding(shape.op, arguments)
    error = ((y.double() - exact).norm() / exact.norm()).item()
    assert 1e-5 < error < 1e-3 if tf32 else error < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_quantisation_agrees_to_the_bit(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 9, 30, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    x[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for out_dtype in INTEGERS:
        q = torch.full(x.shape, 77, dtype=out_dtype).contiguous(memory_format=torch.channels_last)
        for launch in plan_quantize_per_tensor(x, 0.017, q):
            emulate_launch(launch, "sm_90")
        assert torch.equal(q, reference.quantize_per_tensor(x, 0.017, out_dtype))
