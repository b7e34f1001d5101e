"""Which kernel serves a convolution on a GPU, and what its launcher plans. No kernel runs here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from hypothesis import given, settings
from hypothesis import strategies as st

from bench.conv_catalogue import CONV_FAMILIES, make_call, problem_on
from bench.conv_problems import ConvShape
from tilewright.aot.targets import TARGETS
from tilewright.kernels.conv2d import triton_depthwise, triton_implicit, triton_pointwise, triton_stem
from tilewright.kernels.conv2d.triton_launch import MAX_GROUPS, MAX_ROWS, ConvTile, unit
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import route
from tilewright.kernels.int8_conv2d import triton_quantize

MODULES = (triton_pointwise, triton_implicit, triton_stem, triton_depthwise)
ON_EACH_TARGET = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
LAYER = ConvShape(32, 256, 14, 256, 3)


def problem(shape: ConvShape, target: str = "sm_90") -> Problem:
    return problem_on(make_call(shape, "meta"), TARGETS[target])


# ---- the router
@pytest.mark.parametrize(
    "shape, expected",
    [
        (replace(LAYER, window=1), "Triton, 1 x 1"),
        (replace(LAYER, window=1, stride=2), "Triton, 1 x 1"),
        (replace(LAYER, window=1, padding=(1, 1, 1, 1)), "Triton, implicit product"),
        (replace(LAYER, window=1, channels=3), "Triton, 1 x 1"),
        (LAYER, "Triton, implicit product"),
        (replace(LAYER, groups=32), "Triton, implicit product"),
        (replace(LAYER, groups=256), "Triton, depthwise"),
        (replace(LAYER, groups=256, out_channels=512), "Triton, depthwise"),
        (replace(LAYER, channels=3), "Triton, few channels"),
        (replace(LAYER, channels=1, out_channels=1), "Triton, few channels"),
        (replace(LAYER, channels=4, groups=2), "Triton, implicit product"),
        (replace(LAYER, channels=0), "reference"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("target", [TARGETS["sm_80"], TARGETS["gfx942"]], ids=lambda target: target.name)
def test_who_serves_a_layer(shape: ConvShape, expected: str, dtype: torch.dtype, target) -> None:
    decision = route(problem_on(make_call(replace(shape, dtype=dtype), "meta"), target))
    assert decision.name == expected
    assert all(reason for _, reason in decision.declined)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rsplit("_", 1)[1])
def test_what_every_kernel_declines(module) -> None:
    shape = {
        triton_pointwise: replace(LAYER, window=1),
        triton_stem: replace(LAYER, channels=3),
        triton_depthwise: replace(LAYER, groups=256),
    }.get(module, LAYER)
    good = problem(shape)
    assert module.why_not(good) is None
    assert "on 'cpu'" in module.why_not(replace(good, device="cpu"))
    assert "has 7.5" in module.why_not(replace(good, capability=(7, 5)))
    assert "torch.float64" in module.why_not(replace(good, x_dtype=torch.float64))
    assert "32 bits" in module.why_not(replace(good, m=MAX_ROWS + 1))
    assert "leave int32" in module.why_not(replace(good, x_dtype=torch.int8, k=140_000))
    assert module.why_not(replace(good, k=140_000)) is None or module is triton_pointwise
    assert "no input channels" in module.why_not(replace(good, k=0))


def test_reasons_name_what_a_kernel_is_for() -> None:
    assert triton_pointwise.why_not(problem(LAYER)) == "takes windows of 1 x 1 without padding"
    assert triton_pointwise.why_not(problem(replace(LAYER, window=1, groups=2))) == "takes one group"
    assert "up to 4 input channels, not 256" in triton_stem.why_not(problem(LAYER))
    assert "as many groups as input channels" in triton_depthwise.why_not(problem(LAYER))
    layer = problem(LAYER)
    many = replace(layer, conv=replace(layer.conv, groups=MAX_GROUPS + 1))
    assert "groups" in triton_implicit.why_not(many)
    assert "is for convolutions" in triton_implicit.why_not(replace(layer, conv=None))


def test_quantisation_is_served_by_triton_on_a_gpu() -> None:
    gpu = {"device": "cuda", "capability": (9, 0), "multiprocessors": 132}
    small = Problem("quantize_per_tensor", 100, 0, 64, torch.bfloat16, **gpu)
    assert route(small).name == "Triton"
    assert "torch.float64" in triton_quantize.why_not(replace(small, x_dtype=torch.float64))


# ---- heuristics
@ON_EACH_TARGET
@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 300),
    size=st.integers(1, 112),
    channels=st.integers(1, 2048),
    outputs=st.integers(1, 2048),
    groups=st.sampled_from([1, 1, 2, 32]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.int8]),
)
def test_tiles_fit_the_chip_and_the_instruction(target, batch, size, channels, outputs, groups, dtype) -> None:
    shape = ConvShape(batch, channels * groups, size, outputs * groups, 3, groups=groups, dtype=dtype)
    asked = problem_on(make_call(shape, "meta"), target)
    tile = ConvTile.for_problem(asked, channels)
    assert tile.block_m in (64, 128) and tile.block_n in (16, 32, 64, 128)
    assert tile.num_warps in (4, 8)
    assert tile.block_m * tile.block_n // tile.epilogue_parts <= 128 * 64 or target.backend == "hip"
    assert tile.block_k >= 16 and (dtype != torch.int8 or tile.block_k >= 32)
    assert tile.block_k * dtype.itemsize <= 128
    stage = (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize
    assert stage * tile.num_stages <= target.shared_bytes
    config = triton_implicit.choose(asked)
    assert config.flat or channels >= 2 * tile.num_stages * tile.block_k


@pytest.mark.parametrize(
    "shape, expected",
    [
        (ConvShape(32, 64, 56, 64, 3), (128, 64, 64, 8, True)),
        (ConvShape(256, 512, 14, 512, 3), (128, 128, 64, 8, False)),
        (ConvShape(256, 512, 14, 512, 5), (128, 128, 64, 8, True)),
        (ConvShape(1, 512, 7, 512, 3), (64, 64, 64, 4, False)),
        (ConvShape(32, 512, 28, 512, 3, groups=32), (128, 16, 16, 4, True)),
        (ConvShape(32, 77, 28, 77, 3), (128, 128, 32, 8, True)),
    ],
    ids=["resnet 1", "wide", "unrolled too far", "batch 1", "grouped", "odd channels"],
)
def test_what_an_h200_runs(shape: ConvShape, expected: tuple) -> None:
    config = triton_implicit.choose(problem(shape))
    tile = config.tile
    assert (tile.block_m, tile.block_n, tile.block_k, tile.num_warps, config.flat) == expected


# ---- plans
@pytest.mark.parametrize("family", CONV_FAMILIES)
@settings(deadline=None, max_examples=40)
@given(batch=st.integers(1, 40), size=st.integers(7, 60), outputs=st.integers(1, 300), stride=st.integers(1, 3))
def test_programs_cover_the_result_and_no_more_than_a_tile_beyond(family, batch, size, outputs, stride) -> None:
    channels, window, groups = {"pointwise": (40, 1, 1), "stem": (3, 3, 1)}.get(family, (outputs, 3, 1))
    groups = outputs if family == "depthwise" else groups
    shape = ConvShape(batch, channels, size, outputs, window, stride, groups=groups)
    call = make_call(shape, "meta")
    chosen = CONV_FAMILIES[family].choose(problem_on(call, TARGETS["sm_90"]))
    (launch,) = CONV_FAMILIES[family].plan(call, chosen)
    block_m = launch.constants["BLOCK_M"]
    block_n = launch.constants.get("BLOCK_N") or launch.constants["BLOCK_C"]
    programs = 1
    for count in launch.grid:
        programs *= count
    assert programs == -(-call.rows // block_m) * -(-outputs // block_n)
    assert launch.args["n_units"] * launch.constants["UNIT_N"] == outputs


def test_units_let_24_channels_load_16_bytes() -> None:
    assert (unit(24), unit(24, 24 * 56), unit(64, 48), unit(77), unit(0)) == (8, 8, 16, 1, 16)
    (launch,) = triton_pointwise.plan_pointwise(
        make_call(ConvShape(2, 24, 8, 40), "meta"), ConvTile(64, 64, 32, 1, 4, 2)
    )
    assert (launch.constants["UNIT_K"], launch.args["k_units"], launch.args["x_pixel_units"]) == (8, 3, 3)
    assert launch.constants["DENSE"]


@pytest.mark.parametrize(
    "shape, dense",
    [
        (ConvShape(2, 16, 8, 16), True),
        (ConvShape(2, 16, 8, 16, stride=2), False),
        (ConvShape(2, 16, (7, 1), 16, stride=2), False),
        (ConvShape(2, 16, (8, 1), 16, stride=2), True),
        (ConvShape(1, 16, (1, 8), 16, stride=2), True),
        (ConvShape(2, 16, 1, 16), True),
    ],
    ids=["plain", "strided", "odd column", "even column", "one row of one image", "one pixel"],
)
def test_an_image_without_gaps_is_a_matrix(shape: ConvShape, dense: bool) -> None:
    (launch,) = triton_pointwise.plan_pointwise(make_call(shape, "meta"), ConvTile(64, 64, 32, 1, 4, 2))
    assert launch.constants["DENSE"] == dense


def test_images_of_another_size_are_the_same_binary() -> None:
    """Sizes of images are run-time arguments that Triton must not specialise: else 1 or 16 would compile anew."""
    for family, channels in (("pointwise", 64), ("implicit", 64), ("stem", 3), ("depthwise", 64)):
        shape = ConvShape(1, channels, 9, 64, 1 if family == "pointwise" else 3)
        if family == "depthwise":
            shape = replace(shape, groups=64)
        (launch,) = CONV_FAMILIES[family].plan(make_call(shape, "meta"), None)
        special = {p.name for p in launch.kernel.params if not p.is_constexpr and not p.do_not_specialize}
        assert not special & {"M", "H", "W", "P", "Q", "pad_top", "pad_left"}
