"""The benchmarks of 2:4, as far as they need no GPU."""

from __future__ import annotations

import pytest
import torch

from bench.problems import SPARSE, Shape, make_arguments, reference
from bench.result_files import Row
from bench.tables import sparse24_cpu, sparse24_gpu
from tilewright.kernels.dispatch.problem import Problem


def test_bytes_are_those_of_the_arguments_and_the_result() -> None:
    arguments = make_arguments("int8_linear_quantized", Shape(3, 5, 16, bias=False))
    assert sparse24_gpu.bytes_moved(arguments, n=5, out_bytes=2) == 3 * 16 + 3 * 4 + 5 * 16 + 5 * 4 + 3 * 5 * 2


@pytest.mark.parametrize("op", sparse24_gpu.OPS)
@pytest.mark.parametrize("m", [1, 40])
def test_a_wrong_corner_stops_the_benchmark(op: str, m: int) -> None:
    arguments = make_arguments(op, Shape(m, 300, 128, group_size=32, bias=False))
    found = reference(op)(**arguments)
    sparse24_gpu.assert_near_definition(op, arguments, found)
    found[-1, -1] += 10
    with pytest.raises(ValueError, match=f"{op}: RMS error"):
        sparse24_gpu.assert_near_definition(op, arguments, found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert sparse24_gpu.main([]) == 1
    assert "no GPU here" in capsys.readouterr().out


def test_a_dry_run_measures_and_judges_without_writing(capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in sparse24_gpu.RESULTS.iterdir()}
    assert sparse24_gpu.main(["--dry-run"]) == 0
    found = capsys.readouterr().out
    assert all(op in found for op in sparse24_gpu.OPS)
    assert found.count("F.linear bfloat16") == 2 * len(sparse24_gpu.OPS)
    assert found.count("routed: ") == 2 * len(sparse24_gpu.OPS)
    assert "unpacked once" in found
    assert found.count("x dense bfloat16; the least is") == 3
    assert {path: path.stat().st_mtime_ns for path in sparse24_gpu.RESULTS.iterdir()} == before


@pytest.mark.parametrize("op", SPARSE)
def test_what_the_gate_refuses_is_measured_all_the_same(op: str) -> None:
    """A gate can be set by what was measured only if that includes what it refuses now."""
    pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")
    gpu = {"device": "cuda", "capability": (9, 0), "multiprocessors": 132, "group_size": 128}
    names = {name for name, _ in sparse24_gpu.runnable(op, Problem(op, 512, 4096, 4096, torch.bfloat16, **gpu))}
    kernels = {"Triton, unpacked in registers", "unpacked once, then dense"}
    assert names == (kernels if op == "sparse24_int4_linear" else {*kernels, "Triton, mma.sp"})


def test_goals_are_judged_by_the_worst_of_what_users_get() -> None:
    def row(variant: str, m: int, speedup: float) -> Row:
        return Row(m, 4096, 4096, "sparse24_linear", variant, microseconds=1.0, speedup=speedup)

    rows = [
        row("Triton, mma.sp", 1, 0.1),
        row("routed: x", 1, 1.6),
        row("routed: x", 16, 1.4),
        row("routed: x", 64, 1.0),
    ]
    first, second = sparse24_gpu.goals(rows)
    assert first.startswith("MISSED: 2:4 bf16 at M <= 16 >= 1.5x") and "1.40x (sparse24_linear, M = 16" in first
    assert second.startswith("met: anything at 2:4 >= 0.97x") and "1.00x" in second


def test_the_table_of_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert sparse24_cpu.main(["--shape", "32", "64", "--batches", "1", "9", "--seconds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    dispatched = [line.split("|")[-2].strip() for line in lines[2:]]
    assert all(name.startswith(("C kernel, 2:4", "unpacked once")) for name in dispatched)
