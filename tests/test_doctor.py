"""What `tilewright doctor` says of machines that lack this or that."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tilewright.__main__ import main
from tilewright.autotune import ShortList, shortlist
from tilewright.commands import doctor
from tilewright.kernels.cpu import build, native
from tilewright.kernels.dispatch.router import route


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What was looked up before is forgotten, and again after."""
    native.reload()
    route.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native.reload()
    route.cache_clear()


def found(subject: str) -> str:
    return next(finding.found for finding in doctor.examine() if finding.subject == subject)


def test_versions_and_instruction_set(anew: pytest.MonkeyPatch):
    assert found("torch") == torch.__version__
    reason = native.why_no_native()
    assert found("C kernels") == (reason or f"use {native.isa()}")
    assert found("w4a16 on this CPU") != "reference"


def test_kernels_turned_off(anew: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    anew.setenv("TILEWRIGHT_CPU_ISA", "off")
    assert "turned off" in found("C kernels")
    assert found("  what that costs") == doctor.COST
    assert found("w4a8 on this CPU") != "C kernel"
    assert main(["doctor"]) == 1
    assert "turned off" in " ".join(capsys.readouterr().out.split())


def test_a_forced_instruction_set_is_named(anew: pytest.MonkeyPatch):
    if native.why_no_native() is not None or native.isa() == "avx2":
        pytest.skip("needs C kernels better than AVX2")
    best = native.isa()
    anew.setenv("TILEWRIGHT_CPU_ISA", "avx2")
    native.reload()
    assert found("C kernels") == f"use avx2; TILEWRIGHT_CPU_ISA turns off the better {best}"


def test_an_impossible_instruction_set_is_no_crash(anew: pytest.MonkeyPatch):
    anew.setenv("TILEWRIGHT_CPU_ISA", "mmx")
    assert found("C kernels").startswith("TILEWRIGHT_CPU_ISA=mmx is unknown")
    with pytest.raises(SystemExit) as stopped:
        main(["cure"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("compiler", [True, False])
def test_what_helps_where_nothing_was_compiled(anew: pytest.MonkeyPatch, tmp_path: Path, compiler: bool):
    anew.setattr(build, "LIBRARY", tmp_path / "_native.so")
    if compiler:
        (tmp_path / "cc").write_text("#!/bin/sh\n")
        (tmp_path / "cc").chmod(0o755)
    anew.setenv("PATH", str(tmp_path))
    anew.delenv("CC", raising=False)
    assert "not compiled when the package was installed" in found("C kernels")
    assert ("there is a compiler now (cc)" if compiler else "there is no C compiler") in found("  what helps")


def test_findings_are_marked(anew: pytest.MonkeyPatch):
    out = io.StringIO()
    findings = [doctor.Finding("good", "fine"), doctor.Finding("bad", "broken", good=False)]
    doctor.print_findings(findings, Console(file=out, width=80))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines == [["good", "fine"], ["!", "bad", "broken"]]


def test_tuned_choices_are_counted_and_a_bad_table_is_a_finding(anew: pytest.MonkeyPatch, tmp_path: Path):
    anew.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path))
    assert found("tuned choices").startswith("none, heuristics decide")
    table = tmp_path / "some-cpu.v1.json"
    table.write_text('{"format": 1, "entries": {"a": {"config": {"x": 1}}}}')
    assert found("tuned choices").startswith("1 in ")
    table.write_text("torn")
    assert "cannot be used: it is no JSON" in found("tuned choices") and table.read_text() == "torn"


def test_an_outdated_short_list_is_a_finding(anew: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")
    anew.setattr(shortlist, "SHIPPED", tmp_path)
    shortlist.shipped.cache_clear()
    assert list(doctor.short_list("sm_90")) == []
    made = ShortList("sm_90", "3.7.1")
    nothing = {"fields": [], "kept": [], "dropped": []}
    made.lists = {f"int4_linear.triton_fused | m=<={m} | source=0123": nothing for m in (1, 16)}
    made.write(tmp_path / "sm_90.json")
    shortlist.shipped.cache_clear()
    (found,) = doctor.short_list("sm_90")
    shortlist.shipped.cache_clear()
    assert not found.good and "2 lists of candidates" in found.found and "2 are of other versions" in found.found


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "tilewright", "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert torch.__version__ in done.stdout
