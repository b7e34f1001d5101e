"""What the table of compiled kernels says of a kernel at work, for kernels whose counts can be worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from triton import language as tl

from bench.counts import Counts, Small, count
from bench.tables.compiled import Row, entries, read_table
from tests.aot.small_kernels import copy_kernel, product_kernel
from tilewright.aot.compiler import EMULATED
from tilewright.aot.launch import Launch
from tilewright.aot.specialize import specialize
from tilewright.aot.targets import TARGETS

pytestmark = pytest.mark.aot


def copy(stride: int) -> Small:
    source, result = torch.randn(1024 * stride), torch.empty(1024)
    args = {"source_ptr": source, "target_ptr": result, "count": 1024, "stride": stride}
    return Small(Launch(copy_kernel, (1,), args, {"BLOCK": 1024}))


def row(counts: Counts) -> Row:
    """A line of the table with these counts."""
    return Row("", "", "", "", "sm_80", 1, 0, 0, "", 0, 0, 0, "", **dataclasses.asdict(counts))


def product(depth: int) -> Small:
    k = 128 * depth
    a = torch.randn(64, k).half()
    args = {"a_ptr": a, "b_ptr": a, "c_ptr": torch.empty(64, 64), "K": k}
    return Small(Launch(product_kernel, (1,), args, {"BLOCK": 64, "BLOCK_K": 64, "SUM": tl.float32}), k)


def test_a_coalesced_copy_wastes_nothing() -> None:
    found = count(lambda depth: copy(1), TARGETS["sm_80"])
    assert found == Counts(512.0, 16.0, 1.0, 1.0, 1.0)  # 16 bytes for each of 32 threads


def test_a_strided_copy_shows() -> None:
    found = count(lambda depth: copy(8), TARGETS["sm_80"])
    assert (found.read_bytes, found.read_sectors, found.read_excess) == (128.0, 32.0, 8.0)
    good, bad = (count(lambda depth, stride=stride: copy(stride), TARGETS["sm_80"]) for stride in (1, 8))
    assert row(good).worse(row(bad)) == ["read_sectors", "read_excess"]
    assert row(bad).worse(row(good)) == []


@pytest.mark.parametrize("target, per_step", [("sm_80", 64 * 64 * 64 / (16 * 8 * 16)), ("sm_90", 4.0)])
def test_matrix_instructions_of_the_main_loop(target: str, per_step: float) -> None:
    found = count(product, TARGETS[target])
    assert found.matrix_per_step == per_step  # m16n8k16 by a warp; m64n64k16 by a warp group
    assert found.issue_per_matrix is not None and found.issue_per_matrix > 1


def test_a_product_of_fixed_depth_is_counted_as_a_whole() -> None:
    found = count(lambda depth: product(1) if depth == 1 else None, TARGETS["sm_80"])
    assert found.matrix_per_step == 64 * 64 * 64 / (16 * 8 * 16)
    with_loop = count(product, TARGETS["sm_80"])
    assert found.issue_per_matrix > with_loop.issue_per_matrix  # what comes before and after the loop is in it too


def test_what_cannot_be_emulated_is_left_out() -> None:
    assert count(lambda depth: copy(1), TARGETS["sm_89"]) == Counts()
    assert count(lambda depth: None, TARGETS["sm_80"]) == Counts()


@pytest.mark.slow
def test_small_problems_have_the_binary_of_the_row() -> None:
    checked = 0
    for target, entry in [(target, entry) for target, entry in entries() if target.arch in EMULATED][::10]:
        small = entry.small(1)
        if small is not None:
            checked += 1
            assert specialize(small.launch, target) == specialize(entry.launch, target)
            assert small.launch.constants == entry.launch.constants
    assert checked > 20


def test_every_row_of_an_emulated_target_has_counts() -> None:
    rows = [row for row in read_table().values() if row.target in ("sm_80", "sm_90")]
    without = [row for row in rows if row.read_bytes is None or (row.matrix and row.issue_per_matrix is None)]
    assert rows and not without, "\n".join(str(row) for row in without)
