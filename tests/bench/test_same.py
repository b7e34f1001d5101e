"""Comparing two revisions: which calls, how they take turns, and that a slowed side is seen. No clock decides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import same, same_worker
from bench.same import Comparison, Worker, compare, fastest_tenth
from tilewright.kernels.cpu import build, native

ROOT = Path(__file__).resolve().parents[2]


class FakeSide:
    """A side whose calls take as long as it is told."""

    def __init__(self, name: str, seconds: float, log: list[str], answer: float = 1.0) -> None:
        self.name, self.seconds, self.log, self.answer = name, seconds, log, answer

    def result(self, name: str, of_float: bool = False) -> np.ndarray:
        return np.full(4, 1.2 if of_float else self.answer, dtype=np.float32)

    def block(self, name: str) -> list[float]:
        self.log.append(self.name)
        return [9.0] * 5 + [self.seconds] * 3  # others interrupt most calls


def sides(old: float, new: float, answer: float = 1.0) -> tuple[dict[str, FakeSide], list[str]]:
    log: list[str] = []
    return {"old": FakeSide("o", old, log), "new": FakeSide("n", new, log, answer)}, log


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same, "REST", 0.0)


def test_the_calls_that_matter_are_there():
    linear = {
        f"{kind} linear, {rows}" for kind in ("int8", "int4", "w4a8") for rows in ("1 row", "16 rows", "512 rows")
    }
    models = {f"{name} int8, batch {n}" for name, sizes in (("MiniLM", (1, 32)), ("ResNet-18", (1, 8))) for n in sizes}
    assert {*same_worker.MAKERS} == {*linear, *models, same_worker.CONVERSION}


@pytest.mark.parametrize("new, met", [(1.0, True), (1.02, True), (1.05, False), (0.5, True)])
def test_a_slowed_side_is_seen(new: float, met: bool):
    found = compare("int8 linear, 1 row", sides(1.0, new)[0], rounds=4, wanted=same.RATIO)
    assert found.met == met and found.ratios.median == pytest.approx(1 / new)
    assert ("| NO |" in found.row()) != met


def test_sides_take_turns_and_what_seems_slow_is_measured_longer():
    quick, log = sides(1.0, 1.0)
    compare("int8 linear, 1 row", quick, rounds=4, wanted=same.RATIO)
    assert "".join(log) == "onnoonno"
    slow, log = sides(1.0, 2.0)
    assert len(compare("int8 linear, 1 row", slow, rounds=4, wanted=same.RATIO).old) == same.ATTEMPTS * 4


def test_more_can_be_asked_of_the_conversion():
    faster, _ = sides(1.0, 0.85)
    assert not compare(same_worker.CONVERSION, faster, rounds=2, wanted=1 / 0.8).met
    assert compare(same_worker.CONVERSION, faster, rounds=2, wanted=1 / 0.9).met


@pytest.mark.parametrize("name, answer", [("int8 linear, 1 row", 1.01), ("MiniLM int8, batch 1", 1.1)])
def test_another_result_is_not_timed(name: str, answer: float):
    wrong, log = sides(1.0, 1.0, answer)
    with pytest.raises(ValueError, match=f"{name}: the results differ"):
        compare(name, wrong, rounds=2, wanted=same.RATIO)
    wrong["new"].answer = float("nan")
    with pytest.raises(ValueError, match="differ by nan"):
        compare(name, wrong, rounds=2, wanted=same.RATIO)
    assert log == []


@pytest.mark.parametrize("answer, right", [(1.1, True), (1.39, True), (1.41, False), (0.97, False)])
def test_a_convolutional_network_may_come_nearer_to_the_float_one(answer: float, right: bool):
    name = "ResNet-18 int8, batch 8"
    if right:
        compare(name, sides(1.0, 1.0, answer)[0], rounds=1, wanted=same.RATIO)
    else:
        with pytest.raises(ValueError, match="the results differ"):
            compare(name, sides(1.0, 1.0, answer)[0], rounds=1, wanted=same.RATIO)


def test_interruptions_do_not_count():
    assert fastest_tenth([5.0, 1.0, 9.0]) == 1.0
    assert fastest_tenth([float(i) for i in range(100, 0, -1)]) == 11.0


def test_the_status_is_that_of_the_slowest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    class Ready:
        process, isa = subprocess.CompletedProcess([], 0), "an isa"

    Ready.process.pid = 1
    monkeypatch.setattr(same, "workers", lambda *_: same.contextlib.nullcontext({"old": Ready, "new": Ready}))
    times = {"int8": 1.2, "int4": 1.0, "w4a8": 1.0}
    monkeypatch.setattr(
        same, "compare", lambda name, *_: Comparison(name, same.RATIO, 0.0, [1.0], [times[name.split()[0]]])
    )
    assert same.main(["--base", "x", "--only", "linear"]) == 0
    assert same.main(["--base", "x", "--only", "linear", "--check"]) == 1
    assert same.main(["--base", "x", "--only", "int4 linear", "--check"]) == 0
    assert "| int8 linear, 512 rows |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        same.main(["--base", "x", "--only", "abacus"])


def test_a_block_wakes_first_and_makes_a_few_calls_at_least():
    calls: list[int] = []
    assert len(same_worker.block(lambda: calls.append(1), 0.0, waking=2, fewest=3)) == 3
    assert len(calls) == 5


def test_a_worker_uses_the_package_of_its_folder(tmp_path: Path):
    (tmp_path / "tilewright").symlink_to(ROOT / "tilewright")
    worker = Worker(tmp_path, seconds=0.0)
    try:
        found = worker.result("int4 linear, 16 rows")
        torch.manual_seed(0)
        linear, x = torch.nn.Linear(same_worker.SIZE, same_worker.SIZE), torch.randn(16, same_worker.SIZE)
        assert np.linalg.norm(found - linear(x).detach().numpy()) < 0.2 * np.linalg.norm(found)
        assert len(worker.block("int4 linear, 16 rows")) == 3
    finally:
        worker.end()


def test_a_revision_that_git_does_not_know(tmp_path: Path):
    with pytest.raises(ValueError, match="git has no revision 'no-such-thing'"):
        same.extract("no-such-thing", tmp_path / "old")


def test_the_worker_imports_nothing_of_its_own_revision():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print([m for m in sys.modules if m.startswith('bench')])"
    command = [sys.executable, "-c", code, str(ROOT / "bench" / "same_worker.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("up_to_date", [True, False])
def test_kernels_are_compiled_where_they_are_of_other_sources(up_to_date: bool, tmp_path: Path):
    if native.why_no_native():
        pytest.skip(str(native.why_no_native()))
    rules = tmp_path / "tilewright" / "kernels" / "cpu" / "build.py"
    rules.parent.mkdir(parents=True)
    rules.write_text(
        f"from pathlib import Path\nLIBRARY = {str(build.LIBRARY)!r}\n"
        f"def source_hash(): return {build.source_hash() if up_to_date else 'another'!r}\n"
        "def build(): Path(__file__).with_name('built').touch()\n"
    )
    same.build(tmp_path)
    assert rules.with_name("built").exists() != up_to_date
