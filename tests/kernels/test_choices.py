"""The table of measured choices: what the router makes of it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.kernels.conftest import forget_choice
from tilewright.kernels.cpu import build, choices, native
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import implementations, route

SMALL = Problem("int8_linear", 16, 1024, 1024, torch.float32, device="cpu")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A table in which oneDNN is twice as fast at 16 rows, and the C kernel at 128."""
    if native.why_no_native():
        pytest.skip(str(native.why_no_native()))
    path = tmp_path / "choices.csv"
    rows = [
        ("int8_linear", native.isa(), "int8", m, 1024, 1024, 2, "oneDNN", other) for m, other in ((16, 1), (128, 4))
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([choices.COLUMNS, *rows])
    monkeypatch.setattr(choices, "TABLE", path)
    choices._table.cache_clear()
    forget_choice()
    yield path
    monkeypatch.undo()
    choices._table.cache_clear()
    forget_choice()


def test_the_faster_one_serves_and_the_reason_is_given(table: Path):
    onednn = next(other for other in implementations(SMALL.op) if other.name == "oneDNN")
    if reason := onednn.why_not(SMALL):
        pytest.skip(reason)  # such as that its 16-bit sums saturate where there is no VNNI
    decision = route(SMALL)
    assert decision.name == "oneDNN"
    assert dict(decision.declined)["C kernel"] == "oneDNN was 2.00 times as fast at 16 x 1024 x 1024 (M x N x K)"
    assert route(SMALL.with_rows(20)).name == "oneDNN"
    assert route(SMALL.with_rows(200)).name == "C kernel"
    y = torch.ops.tilewright.int8_linear(torch.randn(16, 8), torch.ones(8, 8, dtype=torch.int8), torch.ones(8))
    assert y.shape == (16, 8)


@pytest.mark.parametrize(
    "other",
    [
        Problem("int8_linear", 16, 64, 64, torch.float32),  # 256 times smaller than what was timed
        Problem("int4_int8_linear", 16, 1024, 1024, torch.float32, group_size=128),
        Problem("int8_linear", 16, 1024, 1024, torch.float64),
        Problem("int8_linear", 16, 1024, 1024, torch.float32, activation="gelu"),
    ],
    ids=["far", "other operator", "not taken", "activation"],
)
def test_the_table_is_silent_elsewhere(table: Path, other: Problem):
    found = dict(route(other).declined)
    assert "times as fast" not in found.get("C kernel", "")


def test_an_implementation_that_cannot_serve_is_not_preferred(table: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tilewright.kernels.int8_linear.cpu.why_not", lambda problem: "not on Sundays")
    forget_choice()
    assert route(SMALL).name == "C kernel"


def test_the_table_that_comes_with_the_package_names_what_there_is():
    names = {op: {other.name for other in implementations(op)} for op in ("int8_linear", "int4_linear")}
    rows = choices._table()
    assert rows
    for (op, isa, _), timed in rows.items():
        assert isa in build.ISAS
        known = names.setdefault(op, {other.name for other in implementations(op)})
        assert {row.other for row in timed} <= known
        assert all(row.c_kernel_ms > 0 and row.other_ms > 0 for row in timed)


@pytest.mark.parametrize("op", ["int8_weight_only_linear", "int4_linear"])
def test_few_channels_and_many_rows_go_to_the_float_library(isa: str, op: str):
    if isa == "portable":
        pytest.skip("plain C is used only where it is forced")
    narrow = Problem(op, 704, 10, 512, torch.float32, group_size=128 if op == "int4_linear" else None)
    decision = route(narrow)
    assert decision.name == choices.WIDENED and decision.origin == "shipped rule"
    assert "few channels" in dict(decision.declined)["C kernel"]
    assert route(replace(narrow, n=40)).name == choices.WIDENED
    assert route(replace(narrow, n=40, m=128)).name == choices.WIDENED
    wide = replace(narrow, n=40, k=2048)  # which does not stay widened
    assert (route(wide).name == choices.WIDENED) == (isa not in ("avx2", "avx_vnni"))
    for other in (narrow.with_rows(32), wide.with_rows(256), replace(narrow, activation="relu")):
        assert route(other).name != choices.WIDENED
    bfloat16 = route(replace(narrow, compute_dtype=torch.bfloat16)).name
    assert (bfloat16 == choices.WIDENED) == (isa not in ("amx", "avx512_bf16")), "where bfloat16 is no faster"


def test_an_instruction_set_without_rows_takes_those_of_its_kin(table: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choices, "KIN", {("avx2", "int8"): native.isa()})
    best = native.isa()
    assert choices.faster(SMALL) is not None
    monkeypatch.setattr(native, "isa", lambda: "avx2")
    assert (choices.faster(SMALL) is not None) == (best != "portable")
    monkeypatch.setattr(choices, "KIN", {})
    assert (choices.faster(SMALL) is None) == (best != "avx2")


def test_kin_do_the_same_in_their_dtype():
    assert {isa for isa, _ in choices.KIN} <= set(build.ISAS) and set(choices.KIN.values()) <= set(build.ISAS)
