"""Rung 5 for the convolution kernels: their PTX executed on an emulated GPU against the definition.

Bounds, races and waits are checked at every access; outputs are poisoned first. The default run takes each family on
both architectures at four and eight warps: half precision and offset bytes on sm_80, bfloat16 and int8 on sm_90, where
the instruction is another; sizes are multiples of nothing. ``-m slow`` takes every config that the heuristics choose
for layers of many kinds.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from bench.catalogue import describe
from bench.conv_catalogue import CONV_FAMILIES, make_call, poisoned_call, problem_on
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
from tilewright.aot import compile_launch, emulate_launch
from tilewright.aot.emulator import AsyncHazard, OutOfBounds
from tilewright.aot.launch import Launch
from tilewright.aot.targets import TARGETS
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
        assert_rounded(y, exact, arguments)
    else:
        assert_close_as_plain(y, plain_result(arguments), exact)


@pytest.mark.parametrize("family", ["pointwise", "taps", "stem", "depthwise"])
def test_a_dropped_mask_is_out_of_bounds(family: str) -> None:
    (launch,) = plan(family, make_call(SHAPES[family]), 4)
    compiled = compile_launch(launch, "sm_80")
    compiled.emulate(launch.grid, launch.args)
    unmasked = re.sub(r"@!?%p\d+ (st\.global)", r"\1", compiled.ptx)
    with pytest.raises(OutOfBounds, match="past the end of out_ptr"):
        replace(compiled, text=unmasked).emulate(launch.grid, launch.args)


@pytest.mark.parametrize("family", ["pointwise", "flat"])
def test_a_removed_wait_for_copies_is_a_hazard(family: str) -> None:
    shape = replace(SHAPES[family], channels=256, dtype=torch.bfloat16)
    (launch,) = plan(family, make_call(shape), 4)
    compiled = compile_launch(launch, "sm_80")
    compiled.emulate(launch.grid, launch.args)
    hasty = re.sub(r"cp\.async\.wait_group\s+\S+;", "", compiled.ptx)
    assert hasty != compiled.ptx
    with pytest.raises(AsyncHazard):
        replace(compiled, text=hasty).emulate(launch.grid, launch.args)


@pytest.mark.parametrize("family", ["pointwise", "flat"])
def test_integer_sums_are_exact(family: str) -> None:
    shape = replace(SHAPES[family], dtype=torch.int8, out_dtype=torch.float32, bias=False)
    y = emulate(family, shape, 4, "sm_90")
    assert torch.equal(y, reference_result(shape.op, make_conv_arguments(shape)))


@pytest.mark.parametrize("target, dtype", [("sm_80", torch.uint8), ("sm_90", torch.int8)])
@pytest.mark.parametrize("family", SHAPES)
def test_zero_points(family: str, target: str, dtype: torch.dtype) -> None:
    shape = replace(SHAPES[family], dtype=dtype, residual=True, activation="relu", zero_points=(-127, 40, -9))
    arguments = make_conv_arguments(shape)
    assert_rounded(emulate(family, shape, 4, target), exact_before_rounding(shape.op, arguments), arguments)


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


@pytest.mark.parametrize(
    "target, dtype",
    [("sm_80", torch.float16), ("sm_90", torch.bfloat16), ("sm_90", torch.float32)],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_quantisation_agrees_to_the_bit(target: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 9, 30, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    x[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for out_dtype in INTEGERS:
        q = torch.full(x.shape, 77, dtype=out_dtype).contiguous(memory_format=torch.channels_last)
        for launch in plan_quantize_per_tensor(x, 0.017, q, -100):
            emulate_launch(launch, target)
        assert torch.equal(q, reference.quantize_per_tensor(x, 0.017, out_dtype, -100))


@dataclass(frozen=True)
class Case:
    """A small image for a config that was chosen for large ones with as many channels. layout: how x lies in memory."""

    family: str
    target: str
    config: Any
    shape: ConvShape
    layout: str

    def __str__(self) -> str:
        shape, config = self.shape, self.config
        dtype = "tf32" if shape.allow_tf32 else str(shape.dtype).removeprefix("torch.")
        tile = f"{describe(config.tile)} flat={int(config.flat)}" if self.family == "implicit" else describe(config)
        layer = f"{shape.channels}to{shape.out_channels} g{shape.groups} {shape.activation} {self.layout}"
        return f"{self.family} {tile} {self.target} {dtype} {layer}".replace(" ", "-")


#: Dtypes of one size share their configs: each config gets one of them on each target, in turn.
SIZES = (
    ({"dtype": torch.float16}, {"dtype": torch.bfloat16}),
    ({"dtype": torch.int8}, {"dtype": torch.uint8}, {"dtype": torch.int8, "out_dtype": torch.float32}),
    ({"dtype": torch.float32}, {"dtype": torch.float32, "allow_tf32": True}),
)
ENDS: tuple[dict[str, Any], ...] = (
    {"bias": False},
    {"activation": "relu", "residual": True},
    {"activation": "silu"},
    {"activation": "leaky_relu", "bias": False, "residual": True},
    {"activation": "relu6"},
    {"activation": "gelu", "residual": True},
)
LAYOUTS = ("contiguous", "some channels", "cropped", "every second image", "channels first")


def layers(family: str) -> Iterator[ConvShape]:
    """Layers whose tiles differ: channels are multiples of 16, of 8 and of nothing; one tile of columns and two."""
    if family == "pointwise":
        for channels, columns in itertools.product((13, 24, 72, 192), (9, 24, 41, 130)):
            yield ConvShape(2, channels, (7, 9), columns, stride=(1, 1 + columns % 2))
    elif family == "implicit":
        for channels, columns in itertools.product((13, 24, 80), (9, 24, 41, 130)):
            yield ConvShape(2, channels, (7, 5), columns, **WINDOW)
        for columns in (41, 130):  # long taps, which are loops of their own
            yield ConvShape(1, 1024, (8, 9), columns, (1, 2), padding=(0, 0, 1, 0))
        for group_channels, columns in itertools.product((3, 16), (5, 40)):
            yield ConvShape(2, 3 * group_channels, (7, 5), 3 * columns, **WINDOW, groups=3)
    elif family == "stem":
        for channels, columns in itertools.product((1, 3, 4), (9, 24, 41, 130)):
            yield ConvShape(2, channels, (17, 13), columns, 3 + 2 * (channels % 2), 2)
    else:
        for channels, times in itertools.product((9, 24, 41, 72), (1, 2)):
            window = WINDOW if times == 1 else {"window": 7}
            yield ConvShape(2, channels, (7, 9), times * channels, groups=channels, **window)


def cases() -> list[Case]:
    """Every config that is chosen for the layers above in small and in large batches, once for each dtype's size."""
    found = []
    for family, target in itertools.product(CONV_FAMILIES, ("sm_80", "sm_90")):
        seen: set[tuple[Any, int]] = set()
        for layer, size, batch in itertools.product(layers(family), range(len(SIZES)), (1, 4096)):
            turn = len(found)
            end = ENDS[turn % len(ENDS)]
            before = sum(one == size for _, one in seen)
            kind = SIZES[size][(before + (target == "sm_90")) % len(SIZES[size])]
            if "out_dtype" in kind:  # the integers themselves: see test_every_config
                end = {"bias": False}
            shape = replace(layer, **kind, **end)
            problem = problem_on(make_call(replace(shape, batch=batch), "meta"), TARGETS[target])
            config = CONV_FAMILIES[family].choose(problem)
            if CONV_FAMILIES[family].why_not(problem) is None and (config, size) not in seen:
                seen.add((config, size))
                layout = LAYOUTS[turn % len(LAYOUTS)]
                found.append(Case(family, target, config, replace(shape, batch=images(shape, config)), layout))
    return found


def images(shape: ConvShape, config: Any) -> int:
    """As many as fill one tile and a part of another."""
    block_m = getattr(config, "tile", config).block_m
    pixels = make_call(replace(shape, batch=1), "meta").rows
    return block_m // pixels + 1


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """``x`` with other strides."""
    n, channels, height, width = x.shape
    if layout == "channels first":
        return x.contiguous()
    sizes = {
        "some channels": (n, height, width, channels + 5),
        "cropped": (n, height + 1, width + 3, channels),
        "every second image": (2 * n, height, width, channels),
    }
    if layout not in sizes:
        return x
    wide = x.new_ones(sizes[layout]).permute(0, 3, 1, 2)
    view = {
        "some channels": wide[:, 3 : channels + 3],
        "cropped": wide[:, :, 1:, 2 : width + 2],
        "every second image": wide[1::2],
    }[layout]
    return view.copy_(x)


CASES = cases()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_config(case: Case) -> None:
    shape = case.shape
    arguments = make_conv_arguments(shape)
    arguments["x"] = laid_out(arguments["x"], case.layout)
    call = poisoned_call(shape.op, arguments)
    for launch in CONV_FAMILIES[case.family].plan(call, case.config):
        emulate_launch(launch, case.target, profile=False)
    exact = exact_before_rounding(shape.op, arguments)
    if shape.out_dtype is not None:
        assert torch.equal(call.result, reference_result(shape.op, arguments))
    elif shape.dtype in INTEGERS:
        assert_rounded(call.result, exact, arguments)
    elif shape.allow_tf32:
        assert (call.result.double() - exact).norm() <= 1e-3 * exact.norm()
    else:
        assert_close_as_plain(call.result, plain_result(arguments), exact)


def test_the_cases_have_every_dtype_layout_and_both_loops() -> None:
    for family, target in itertools.product(CONV_FAMILIES, ("sm_80", "sm_90")):
        mine = [case for case in CASES if (case.family, case.target) == (family, target)]
        dtypes = {torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8}
        assert {case.shape.dtype for case in mine} == dtypes
        assert {case.layout for case in mine} == set(LAYOUTS)
        assert any(case.shape.residual for case in mine) and not all(case.shape.bias for case in mine)
    assert {case.config.flat for case in CASES if case.family == "implicit"} == {False, True}
