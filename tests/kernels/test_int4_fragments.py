"""Int4 weights in fragment order: where every nibble lies, the instruction, what is refused, and who serves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from bench.catalogue import FAMILIES, Family
from bench.problems import Shape, make_arguments
from tests.gpu.compare import check
from tilewright import aot
from tilewright.aot.compiler import compile_launch
from tilewright.aot.targets import find_target
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import route
from tilewright.kernels.formats import int4
from tilewright.kernels.int4_linear import fragments, triton_fragments
from tilewright.kernels.int4_linear.fragments import FragmentWeight, fragment_order
from tilewright.kernels.int4_linear.triton_fragments import CONFIGS, FragmentConfig, plan_fragments, why_not

FAMILY: Family = next(family for family in FAMILIES if family.name == "int4_linear mma.sync")
DTYPES = (torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
H200: dict[str, Any] = {"device": "cuda", "capability": (9, 0), "multiprocessors": 132}


def problem(m: int = 1, n: int = 4096, k: int = 4096, **facts: Any) -> Problem:
    default_decision = {"x_dtype": torch.bfloat16, "scale_dtype": torch.bfloat16, "group_size": 128, **H200}
    return Problem("int4_linear", m, n, k, **{**default_decision, **facts})


def random_weight(n: int, k: int, group_size: int, dtype: torch.dtype, symmetric: bool = False) -> tuple[Any, ...]:
    shape = Shape(1, n, k, dtype, group_size=group_size, symmetric=symmetric)
    arguments = make_arguments("int4_linear", shape)
    return tuple(arguments[name] for name in ("weight_packed", "weight_scale", "weight_zero"))


# ---- order
@pytest.mark.parametrize("n, k", [(16, 64), (1, 192), (37, 128)])
def test_every_nibble_lies_where_the_instruction_takes_it(n: int, k: int) -> None:
    """By the table of m16n8k16 in the PTX ISA and the order of columns in ``fragments.py``, a nibble at a time."""
    weight_packed, _, _ = random_weight(n, k, k, torch.float16)
    words = fragments.pack_words(weight_packed, k)
    tiles = -(-n // 16)
    assert words.dtype == torch.int32 and words.shape == (tiles, k // 64, 32, 4)
    found = torch.full((16 * tiles, k), -1)
    nibbles = torch.stack([words >> 4 * i & 15 for i in range(8)], -1)
    for tile, unit, lane, step, place in torch.cartesian_prod(*map(torch.arange, nibbles.shape)).tolist():
        register, half = place % 4, place // 4
        row = 16 * tile + lane // 4 + 8 * (register % 2)
        column = 64 * unit + 16 * (lane % 4) + 4 * step + 2 * (register // 2) + half
        assert found[row, column] == -1
        found[row, column] = nibbles[tile, unit, lane, step, place]
    assert torch.equal(found[:n], int4.unpack(weight_packed, k).long())
    assert not found[n:].any()


@each_dtype
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_words_of_groups_hold_scale_and_offset(symmetric: bool, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    n, k = 21, 320
    weight_packed, scale, zero = random_weight(n, k, 128, scale_dtype, symmetric)
    weight = fragment_order(weight_packed, -scale, zero, 128, k, dtype)
    assert weight.groups.shape == (2, 3, 8, 2)
    by_row = weight.groups.permute(0, 3, 2, 1).reshape(32, 3)[:n]
    assert torch.equal((by_row >> 16).to(torch.int16).view(scale_dtype), -scale)
    offset = (by_row & 0xFFFF).to(torch.int32)
    offset = torch.where(offset >= 2**15, offset - 2**16, offset).to(torch.int16).view(dtype)
    zeros = torch.full((n, 3), 8) if symmetric else int4.unpack_zero(zero, n)
    assert torch.equal(offset.float(), -(2.0 ** (10 if dtype == torch.float16 else 7)) - zeros.float())


def test_a_weight_is_put_in_order_once_until_it_is_written() -> None:
    packed, scale, zero = random_weight(16, 128, 64, torch.bfloat16)
    first = fragment_order(packed, scale, zero, 64, 128, torch.bfloat16)
    again = fragment_order(packed, scale, zero, 64, 128, torch.bfloat16)
    assert again.words is first.words and again.groups is first.groups
    zero.zero_()
    rezeroed = fragment_order(packed, scale, zero, 64, 128, torch.bfloat16)
    assert rezeroed.words is first.words
    assert (rezeroed.groups & 0xFFFF == 0xC300).all()


@pytest.mark.parametrize("k, group_size, words", [(100, 100, "columns, not of 100"), (192, 96, "groups of 96 columns")])
def test_what_has_no_fragment_order_is_refused_in_words(k: int, group_size: int, words: str) -> None:
    assert words in str(fragments.why_no_fragments(k, group_size))
    weight = random_weight(16, k, group_size, torch.bfloat16)
    with pytest.raises(ValueError, match=words):
        fragment_order(*weight, group_size, k, torch.bfloat16)


def test_scales_of_32_bits_have_no_fragment_order() -> None:
    with pytest.raises(ValueError, match=r"scales of 16 bits, not torch\.float32"):
        fragment_order(*random_weight(16, 64, 64, torch.float32), 64, 64, torch.bfloat16)


# ---- the kernel
@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_machine_code_multiplies_from_registers(config: FragmentConfig, target: str) -> None:
    shape = Shape(config.block_m, 256, 4096, torch.bfloat16, group_size=128, symmetric=False)
    launches, _ = FAMILY.plan(make_arguments("int4_linear", shape, "meta"), config)
    compiled = compile_launch(launches[0], find_target(target))
    assert compiled.sass.matrix == {"HMMA.16816.F32.BF16": 8}
    assert compiled.spill_bytes == 0 and compiled.registers <= 128
    # Words of the current steps and of the next, and x.
    assert compiled.instructions.loads.get(16, 0) == 2 * (config.distance + 1) + 4
    before, _, _ = compiled.ptx.rpartition("mma.sync")
    assert "shared" not in before.partition("{")[2] and "shfl" not in before


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [64, 128, 192, None])
def test_groups_and_the_epilogue(group_size: int | None, symmetric: bool, target: str) -> None:
    """K of steps of one unit and of two, in parts and among warps, the last of which has nothing left to do."""
    for turn, m in enumerate((1, 7, 8, 2)):
        config = CONFIGS[(2 * turn + bool(group_size)) % len(CONFIGS)]
        k = 640 if turn % 2 else 704
        dtype = DTYPES[(turn + symmetric) % 2]
        end = {"activation": ("gelu", "none")[turn % 2], "residual": turn % 2 == 0, "bias": turn != 1}
        arguments = make_arguments("int4_linear", Shape(m, 75, k, dtype, group_size, symmetric, **end))
        launches, (out,) = FAMILY.plan(arguments, config)
        assert len(launches) == (2 if config.splits > 1 else 1)
        for launch in launches:
            aot.emulate_launch(launch, target, profile=False)
        check("int4_linear", out, arguments)


@pytest.mark.aot
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4]], ids=str)
def test_float32_and_scales_of_the_other_dtype(config: FragmentConfig) -> None:
    shape = Shape(config.block_m, 40, 256, torch.float16, group_size=64, symmetric=False)
    arguments = make_arguments("int4_linear", shape)
    for dtype in (torch.float16, torch.bfloat16):
        given = {**arguments, "compute_dtype": dtype, "x": arguments["x"].float(), "bias": arguments["bias"].float()}
        (launch, *_), (out,) = FAMILY.plan(given, config)
        aot.emulate_launch(launch, "sm_90", profile=False)
        assert out.dtype == torch.float32
        check("int4_linear", out, given)


@pytest.mark.aot
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_a_row_without_a_number_stays_without_one_and_alone(bad: float) -> None:
    """With more warps than steps: those that repeat one must not spread it."""
    rows, config = 7, FragmentConfig(8, 8)
    arguments = make_arguments("int4_linear", Shape(rows, 16, 384, torch.bfloat16, group_size=128))
    found = []
    for value in (None, bad):
        if value is not None:
            arguments["x"][rows - 2, 377] = value
        (launch,), (out,) = FAMILY.plan(arguments, config)
        aot.emulate_launch(launch, "sm_90", profile=False)
        found.append(out)
    others = [row for row in range(rows) if row != rows - 2]
    assert torch.equal(found[0][others], found[1][others])
    assert not found[1][rows - 2].isfinite().any()


@pytest.mark.aot
def test_a_row_is_the_same_in_every_batch() -> None:
    """Also in one of more rows than the router gives it: rows do not meet."""
    arguments = make_arguments("int4_linear", Shape(16, 32, 512, torch.bfloat16, group_size=128))
    found = []
    for m in (1, 8, 16):
        (launch,), (out,) = FAMILY.plan({**arguments, "x": arguments["x"][:m]}, FragmentConfig(4, 4))
        aot.emulate_launch(launch, "sm_90", profile=False)
        found.append(out)
    assert torch.equal(found[0], found[2][:1]) and torch.equal(found[1], found[2][:8])


PLAIN = {"bias": None, "residual": None, "activation": "none", "config": CONFIGS[0]}


@pytest.mark.parametrize("columns", [slice(3, 259), slice(0, 256)])
def test_rows_that_are_not_aligned_are_copied_first(columns: slice) -> None:
    """Registers would go to other threads: the launcher must see to 16 bytes."""
    x = torch.randn(5, 300).bfloat16()[:, columns]
    weight = fragment_order(*random_weight(16, 256, 64, torch.bfloat16), 64, 256, torch.bfloat16)
    out = torch.empty(5, 16, dtype=torch.bfloat16)
    (launch,) = plan_fragments(x, weight, out, **PLAIN)
    words = launch.args["x_ptr"]
    assert words.data_ptr() % 16 == 0 and words.stride() == (128, 1)
    assert torch.equal(words.view(torch.bfloat16), x)


def test_a_weight_that_is_not_aligned_is_refused() -> None:
    weight = fragment_order(*random_weight(16, 128, 64, torch.float16), 64, 128, torch.float16)
    flat = torch.cat([weight.words.new_zeros(1), weight.words.flatten()])[1:].view_as(weight.words)
    moved = FragmentWeight(flat, weight.groups, 16, 128, 64, torch.float16, torch.float16)
    x, out = torch.zeros(2, 128).half(), torch.empty(2, 16)
    with pytest.raises(ValueError, match="the words of a weight in fragment order must be aligned to 16 bytes"):
        plan_fragments(x, moved, out, **PLAIN)
    with pytest.raises(ValueError, match="inline PTX"):
        plan_fragments(x, weight, out, **PLAIN, inline_ptx=False)


# ---- who serves, and how
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"device": "cpu"}, "GPU"),
        ({"capability": (7, 5)}, "7.5"),
        ({"capability": (10, 0)}, "8.0 and 9.0 only"),
        ({"capability": None, "gpu_arch": "gfx942"}, "NVIDIA"),
        ({"m": 9}, "up to 8, this one has 9 rows"),
        ({"x_dtype": torch.float32}, "not torch.float32 in torch.float32"),
        ({"scale_dtype": torch.float32}, "scales of 16 bits, not torch.float32"),
        ({"k": 4100}, "a multiple of 64 columns, not of 4100"),
        ({"k": 0, "group_size": 1}, "a multiple of 64 columns, not of 0"),
        ({"group_size": 32}, "groups of 32 columns"),
    ],
)
def test_it_says_what_it_does_not_take(changes: dict[str, Any], words: str) -> None:
    assert words in str(why_not(problem(**changes)))


def test_small_batches_with_narrow_scales_are_served_by_it() -> None:
    names = {m: route(problem(m)).name for m in (1, 8, 9)}
    assert names == {1: "Triton, mma.sync", 8: "Triton, mma.sync", 9: "Triton, fused"}
    assert route(problem(scale_dtype=torch.float32)).name == "Triton, fused"
    assert route(problem(x_dtype=torch.float32, compute_dtype=torch.bfloat16)).name == "Triton, mma.sync"


@pytest.mark.parametrize("n, k", [(1, 64), (384, 384), (1024, 4096), (4096, 14336), (8192, 8192), (128, 65536)])
def test_how_k_is_cut_depends_on_n_k_and_the_gpu_alone(n: int, k: int) -> None:
    chosen = [FragmentConfig.for_problem(problem(m, n, k)) for m in (1, 2, 8)]
    assert len(set(chosen)) == 1
    assert triton_fragments.why_not_config(chosen[0], problem(1, n, k)) is None


def test_warps_fill_the_gpu_in_one_launch_unless_rows_are_very_long() -> None:
    """The first three are what an H200 ran fastest."""
    for n, k in ((4096, 4096), (8192, 8192)):
        assert FragmentConfig.for_problem(problem(1, n, k)) == FragmentConfig(4, 4)
    assert FragmentConfig.for_problem(problem(1, 28672, 4096)) == FragmentConfig(2, 2)
    assert FragmentConfig.for_problem(problem(1, 128, 65536)).splits > 1


@pytest.mark.parametrize(
    "k, group_size, units", [(256, 64, 1), (256, 128, 2), (320, 128, 1), (256, 256, 2), (576, 192, 1)]
)
def test_a_step_lies_inside_one_group(k: int, group_size: int, units: int) -> None:
    assert triton_fragments.step_units(k, group_size) == units
    assert triton_fragments.step_count(k, group_size) == k // 64 // units


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
def test_parts_cover_k_and_none_is_empty(splits: int) -> None:
    for k in (64, 640, 4096):
        arguments = make_arguments("int4_linear", Shape(5, 40, k, torch.bfloat16, group_size=64), "meta")
        launches, _ = FAMILY.plan(arguments, replace(CONFIGS[0], splits=splits))
        steps, each, parts = (launches[0].args["steps"], launches[0].args["steps_per_part"], launches[0].grid[1])
        assert (parts - 1) * each < steps <= parts * each
        assert len(launches) == (1 if parts == 1 else 2)
