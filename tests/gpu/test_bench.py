"""What the benchmarks compute and write, which needs no GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import gpu, result_files
from bench.layers import CPU, GPU, Variant
from bench.missing import Missing
from bench.result_files import Row, markdown, merge, read_rows, slug, write_rows
from bench.tables import conv_layers as run_conv
from bench.tables import peers as run
from bench.tables import roofline
from tilewright.kernels.roofline import Ceilings

ROUND = Ceilings("a device", 1e12, 1e13, 1e14, 2e14, 1e-6, "made up")
ROOT = Path(__file__).resolve().parents[2]


def variant(name: str, make: Any, error: float = 1e-4, operation: torch.dtype = torch.float32) -> Variant:
    return Variant(name, "fp32", make, error, 32, operation)


def absent(linear: nn.Linear, m: int) -> run.Run:
    raise Missing("no such package")


def off_by_a_column(linear: nn.Linear, m: int) -> run.Run:
    return lambda x: linear(x).roll(1, 1)


PLAIN = variant("plain", lambda linear, m: linear)


def test_every_row_is_checked_and_what_has_no_time_has_a_reason():
    variants = [PLAIN, variant("wrong", off_by_a_column), variant("absent", absent)]
    good, wrong, missing = run.measure(variants, 5, 32, 16, ROUND, "cpu", rounds=2)
    assert good.speedup == 1.0 and good.microseconds > 0 and good.error < 1e-5 and good.of_roofline is not None
    assert wrong.microseconds is None and "relative error of" in wrong.note
    assert missing.microseconds is None and missing.note == "Missing: no such package"
    assert "torch" in good.versions and good.date and "threads" in good.device


@pytest.mark.parametrize("m", [1, 40])
def test_a_wrong_corner_is_found(m: int):
    linear, x = nn.Linear(16, 300), torch.randn(m, 16)
    expected = run.expected_of(linear, x)

    def corner(x: torch.Tensor) -> torch.Tensor:
        y = linear(x).clone()
        y[-1, -1] += 1
        return y

    with torch.inference_mode():
        assert run.check(PLAIN, linear, x, expected) < 1e-5
        with pytest.raises(ValueError, match="plain has a relative error"):
            run.check(PLAIN, corner, x, expected)
        with pytest.raises(ValueError, match="gives"):
            run.check(PLAIN, lambda x: linear(x)[:, :7], x, expected)
        with pytest.raises(ValueError, match="relative error of nan"):
            run.check(PLAIN, lambda x: linear(x) * torch.nan, x, expected)


def test_floors_and_what_a_format_could_give():
    half = Variant("half", "bf16", PLAIN.make, 0.1, 16, torch.bfloat16)
    floor, moved = run.floor_of(PLAIN, 1, 1000, 1000, ROUND, 4)
    assert moved == 4 * 1000 * 1000 + 4 * 2000 and floor == moved / 1e12
    assert run.floor_of(PLAIN, 10_000, 1000, 1000, ROUND, 4)[0] == 2e10 / 1e13
    base = 2 * run.floor_of(PLAIN, 1, 4096, 4096, ROUND, 4)[0]
    most = run.most_of([PLAIN, half], base, 1, 4096, 4096, ROUND, 4)
    assert most["fp32"] == 2.0 and 3.98 < most["bf16"] < 4.0


@pytest.mark.parametrize("layer", [(3, 16, 8, 7, 2), (8, 9, 16, 1, 2), (8, 9, 16, 3, 1)], ids=str)
def test_convolutions_are_checked_beside_the_library(layer: tuple[int, int, int, int, int]):
    rows = run_conv.measure(layer, 2, ROUND, "cpu", rounds=2)
    assert [one.note for one in rows] == [""] * 3 and rows[0].speedup == 1.0
    assert rows[0].variant.startswith("oneDNN: ") and rows[2].variant.startswith("Tilewright int8: ")


def row(m: int, name: str, **values: Any) -> Row:
    return Row(m, 64, 32, "fp32", name, **{"device": "d", "date": "2026-01-01", "versions": "v", **values})


def test_rows_are_written_whole_read_back_and_replaced(tmp_path: Path):
    path = tmp_path / "rows.csv"
    old = [row(1, "a", microseconds=2.0, speedup=1.0), row(1, "b", note="Missing: x"), row(16, "a", microseconds=3.0)]
    write_rows(old, path)
    assert read_rows(path) == old and not list(tmp_path.glob("*.partial"))
    new = [row(1, "b", microseconds=1.0, speedup=2.0), row(4, "a", microseconds=9.0)]
    assert [(one.m, one.variant, one.microseconds) for one in merge(old, new)] == [
        (1, "a", 2.0),
        (1, "b", 1.0),
        (4, "a", 9.0),
        (16, "a", 3.0),
    ]
    assert read_rows(tmp_path / "none.csv") == []


def test_the_markdown_table_and_the_plot(tmp_path: Path):
    rows = [
        row(1, "base", microseconds=100.0, speedup=1.0, of_roofline=0.5),
        row(1, "Tilewright int8", microseconds=25.0, speedup=4.0, of_roofline=0.9),
        row(1, "peer", note="Missing: not installed"),
    ]
    text = markdown(rows, "Title")
    assert "| base | 100 us |" in text and "| **Tilewright int8** | 4.00x (90%) |" in text and "| peer | - |" in text
    assert "- peer, M = 1: Missing: not installed" in text and "2026-01-01" in text
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    result_files.plot(rows, tmp_path / "plot.png", {(64, 32): {"fp32": {1: 4.5, 16: 3.0}}})
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_tables_are_whole_after_every_shape_and_stop_in_time(tmp_path: Path):
    output = tmp_path / "out"
    assert run.tables("cpu", [(32, 16)], [1, 2], [PLAIN], output, minutes=1, given=ROUND)
    assert [one.m for one in read_rows(output.with_suffix(".csv"))] == [1, 2]
    assert output.with_suffix(".md").exists()
    assert not run.tables("cpu", [(8, 8)], [1], [PLAIN], output, minutes=-1, given=ROUND)
    assert len(read_rows(output.with_suffix(".csv"))) == 2


def test_the_variants_of_both_devices():
    for variants in (CPU, GPU):
        names = [one.name for one in variants]
        assert len(set(names)) == len(names) and sum(one.ours for one in variants) == 4
        assert all(0 < one.error <= 1 and 4 < one.weight_bits <= 32 for one in variants)
    assert CPU[0].name == "PyTorch fp32 (MKL)" and GPU[0].name == "cuBLAS bf16"


@pytest.mark.parametrize("one", [one for one in CPU if one.ours or "oneDNN" in one.name], ids=lambda one: one.name)
def test_our_variants_run(one: Variant):
    (found,) = run.measure([one], 3, 256, 256, ROUND, "cpu", rounds=2)
    assert found.note == "" and found.microseconds > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]):
    assert gpu.main([]) == 1 and "no GPU here" in capsys.readouterr().out
    assert run.main(["--device", "cuda"]) == 1 and "no GPU here" in capsys.readouterr().out


def test_floors_on_the_command_line(capsys: pytest.CaptureFixture[str]):
    assert roofline.main(["--device", "H200", "--shape", "28672x4096", "--m", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (int4,) = [line for line in lines if line.startswith("int4_linear")]
    # 117.4 M weights at 4.125 bits from 4.8 TB/s.
    assert abs(float(int4.split()[4]) - 28672 * 4096 * 4.125 / 8 / 4.8e6) < 0.1 and "memory" in int4
    with pytest.raises(SystemExit):
        roofline.main(["--device", "Abacus"])


def sleep_step(name: str, seconds: float, share: float = 1.0) -> gpu.Step:
    code = f"import time; print('began', flush=True); time.sleep({seconds}); print('ended')"
    return gpu.Step(name, ("-c", code), share)


def test_steps_end_with_their_share_and_the_summary_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Process(subprocess.Popen):  # type: ignore[type-arg]
        """One whose share is short is over as soon as it has begun."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None and 20 < timeout < 200:
                while not (tmp_path / "long.log").read_text():
                    time.sleep(0.01)
                raise subprocess.TimeoutExpired("long", timeout)
            return super().wait(timeout)

    monkeypatch.setattr(gpu.subprocess, "Popen", Process)
    runner = gpu.Runner(tmp_path, minutes=10, environment={})
    for step in (sleep_step("long", 60, share=0.2), gpu.Step("bad", ("-c", "1/0")), sleep_step("good", 0)):
        runner.run(step)
    summary = json.loads((tmp_path / "gpu_run.json").read_text())
    assert [one["result"] for one in summary] == ["its share of the time was over", "status 1", "done"]
    assert "ZeroDivisionError" in summary[1]["last_line"] and (tmp_path / "long.log").read_text() == "began\n"
    runner.end = 0.0
    runner.run(sleep_step("late", 0))
    assert runner.done[-1]["result"] == "not started: the time was over"


def test_stopping_it_leaves_a_whole_summary(tmp_path: Path):
    code = (
        "import signal, sys\nfrom pathlib import Path\nfrom bench import gpu\n"
        "runner = gpu.Runner(Path(sys.argv[1]), 1, {})\nsignal.signal(signal.SIGTERM, runner.stop)\n"
        "step = ('-c', 'import time; print(1, flush=True); time.sleep(60)')\n"
        "[runner.run(gpu.Step(name, step)) for name in ('one', 'two')]\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    for _ in range(200):
        if (tmp_path / "one.log").exists() and (tmp_path / "one.log").read_text():
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 0
    results = [one["result"] for one in json.loads((tmp_path / "gpu_run.json").read_text())]
    assert results == ["stopped", "not started: stopped"]


@pytest.mark.slow
@pytest.mark.aot
def test_a_dry_run_of_the_one_command(tmp_path: Path):
    """By its path, from elsewhere, as a user of a GPU machine calls it."""
    pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")
    command = [
        sys.executable,
        str(ROOT / "bench" / "gpu.py"),
        "--dry-run",
        "--minutes",
        "10",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert {one["result"] for one in json.loads((tmp_path / "gpu_run.json").read_text())} == {"done"}
    logs = "".join(log.read_text() for log in tmp_path.glob("kernels*.log"))
    assert logs.count("  right") > 20 and "wrong" not in logs
    assert read_rows(tmp_path / "linear_cpu.csv")


def test_the_order_of_importance():
    names = [step.name for step in gpu.steps()]
    assert names[0] == "correctness" and names[1].startswith("int4") and names[-1] == "every peer"
    for step in gpu.steps()[1:]:
        assert step.command[1] in (
            "bench.tables.peers",
            "tilewright",
            "bench.tables.conv_layers",
            "bench.tables.sparse24_gpu",
        )
        if step.command[1] == "bench.tables.peers":  # its options are ones that the table's command has
            with pytest.raises(SystemExit) as stopped:
                run.main([*step.command[2:], "--help"])
            assert stopped.value.code == 0


def test_a_device_name_becomes_a_file_name():
    assert slug("NVIDIA H200") == "nvidia_h200"
