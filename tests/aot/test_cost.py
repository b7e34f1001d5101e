"""The cost estimate against counts that can be worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from triton import language as tl

from bench.problems import Shape
from bench.tables.estimates import OPS, agreement, candidates
from tests.aot.small_kernels import copy_kernel, product_kernel
from tilewright import aot
from tilewright.aot.cost import CHIPS, find_chip

pytestmark = pytest.mark.aot


def emulated_copy(count: int = 4096, blocks: int = 4) -> tuple:
    source, result = torch.randn(count), torch.empty(count)
    args = {"source_ptr": source, "target_ptr": result, "count": count, "stride": 1}
    launch = aot.Launch(copy_kernel, (blocks,), args, {"BLOCK": count // blocks})
    compiled = aot.compile_launch(launch, "sm_80")
    return compiled, compiled.emulate(launch.grid, launch.args)


def emulated_product(target: str, dtype: torch.dtype, k: int = 256) -> tuple:
    a = torch.randint(-3, 4, (64, k)).to(dtype)
    is_int = dtype == torch.int8
    c = torch.empty(64, 64, dtype=torch.int32 if is_int else torch.float32)
    constants = {"BLOCK": 64, "BLOCK_K": 64, "SUM": tl.int32 if is_int else tl.float32}
    launch = aot.Launch(product_kernel, (1,), {"a_ptr": a, "b_ptr": a, "c_ptr": c, "K": k}, constants)
    compiled = aot.compile_launch(launch, target)
    stats = compiled.emulate(launch.grid, launch.args)
    assert torch.equal(c.double(), a.double() @ a.double().t())
    return compiled, stats


def test_a_copy_is_bound_by_memory() -> None:
    compiled, stats = emulated_copy()
    found = aot.estimate(compiled, stats, "A100", blocks=1 << 20)
    chip = CHIPS["A100"]
    assert found.bound == "memory" and found.seconds == found.memory
    assert found.memory == pytest.approx((1 << 20) * 1024 * 8 / chip.dram)
    assert found.matrix == 0 and found.shared == 0


def test_bytes_that_stay_in_l2_are_told() -> None:
    compiled, stats = emulated_copy()
    found = aot.estimate(compiled, stats, "A100", dram_bytes=0)
    assert found.memory == pytest.approx(4096 * 8 / CHIPS["A100"].l2)


@pytest.mark.parametrize(
    "target, chip, dtype, rate",
    [
        ("sm_80", "A100", torch.float16, 2048),
        ("sm_80", "A100", torch.int8, 4096),
        ("sm_90", "H200", torch.bfloat16, 4096),
        ("sm_90", "H200", torch.int8, 8192),
    ],
)
def test_matrix_time_is_operations_by_rate(target: str, chip: str, dtype: torch.dtype, rate: int) -> None:
    compiled, stats = emulated_product(target, dtype)
    found = aot.estimate(compiled, stats, chip)
    assert found.matrix == pytest.approx(2 * 64 * 64 * 256 / rate / CHIPS[chip].clock)


def test_whole_waves_count() -> None:
    compiled, stats = emulated_product("sm_80", torch.float16)
    sms = CHIPS["A100"].multiprocessors
    one, two = (aot.estimate(compiled, stats, "A100", blocks=blocks) for blocks in (sms, sms + 1))
    assert two.matrix == pytest.approx(2 * one.matrix)
    assert two.issue == pytest.approx(2 * one.issue)


def test_a_worse_layout_costs_more() -> None:
    compiled, stats = emulated_copy()
    strided, result = torch.randn(4096 * 8), torch.empty(4096)
    args = {"source_ptr": strided, "target_ptr": result, "count": 4096, "stride": 8}
    launch = aot.Launch(copy_kernel, (4,), args, {"BLOCK": 1024})
    worse = aot.compile_launch(launch, "sm_80")
    worse_stats = worse.emulate(launch.grid, launch.args)
    assert torch.equal(result, strided[::8])
    good, bad = aot.estimate(compiled, stats, "A100"), aot.estimate(worse, worse_stats, "A100")
    assert bad.memory == pytest.approx(good.memory * (8 + 1) / 2)  # a sector for each element read, as many written


def copy_of(blocks: int, stride: int) -> aot.Launch:
    source, result = torch.randn(1024 * blocks * stride), torch.empty(1024 * blocks)
    args = {"source_ptr": source, "target_ptr": result, "count": 1024 * blocks, "stride": stride}
    return aot.Launch(copy_kernel, (blocks,), args, {"BLOCK": 1024})


def test_a_few_programs_stand_for_the_grid() -> None:
    launch = copy_of(blocks=300, stride=1)
    compiled = aot.compile_launch(launch, "sm_80")
    whole = aot.estimate(compiled, compiled.emulate(launch.grid, launch.args), "A100")
    few = aot.estimate_launch(launch, "A100", programs=3)
    assert few == whole  # a copy moves every tensor once, in whole sectors


def test_configurations_are_ranked() -> None:
    found = aot.rank({"strided": [copy_of(64, 8)], "both": [copy_of(64, 1)] * 2, "plain": [copy_of(64, 1)]}, "A100")
    assert list(found) == ["plain", "both", "strided"]
    assert found["both"] == 2 * found["plain"]


def test_what_cannot_be_launched_comes_last_and_what_is_empty_takes_no_time() -> None:
    a = torch.zeros(128, 256, dtype=torch.half)
    constants = {"BLOCK": 128, "BLOCK_K": 128, "SUM": tl.float32}
    large = aot.Launch(
        product_kernel, (1,), {"a_ptr": a, "b_ptr": a, "c_ptr": torch.zeros(128, 128), "K": 256}, constants, 8, 4
    )
    empty = dataclasses.replace(copy_of(1, 1), grid=(0,))
    assert aot.rank({"large": [large], "empty": [empty]}, "A100") == {"empty": 0.0, "large": float("inf")}


@pytest.mark.parametrize("op", [OPS[0], *(pytest.param(op, marks=pytest.mark.slow) for op in OPS[1:])])
def test_the_configurations_of_every_linear_operator_can_be_ranked(op: str) -> None:
    found = aot.rank(candidates(op, Shape(16, 256, 512, group_size=128), "H100"), "H100")
    assert len(found) > 1 and all(0 < seconds < 1e-3 for seconds in found.values())
    assert list(found.values()) == sorted(found.values())


def test_agreement_of_two_orders() -> None:
    one = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert agreement(one, {"a": 5.0, "b": 6.0, "c": 9.0}) == pytest.approx(1)
    assert agreement(one, {"a": 9.0, "b": 6.0, "c": 5.0}) == pytest.approx(-1)
    assert agreement({"a": 1.0}, {"a": 2.0}) == 1.0


def test_wrong_chips_and_empty_counts_are_refused() -> None:
    compiled, stats = emulated_copy()
    with pytest.raises(ValueError, match="no chip is called 'B300'; known: A100"):
        find_chip("B300")
    with pytest.raises(ValueError, match="sm_80 code does not run on H200"):
        aot.estimate(compiled, stats, "H200")
    with pytest.raises(ValueError, match="nothing was emulated"):
        aot.estimate(compiled, compiled.emulate((0,), {"source_ptr": None, "target_ptr": None, "count": 0}), "A100")


def test_chips_name_their_source() -> None:
    for chip in CHIPS.values():
        assert chip.source and all(value for value in dataclasses.astuple(chip))
