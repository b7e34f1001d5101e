"""What a CPU does at most: what is measured, what is kept, and what is not."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from tilewright.autotune import tables
from tilewright.autotune.clock import CpuClock
from tilewright.commands import doctor
from tilewright.kernels.cpu import native, peaks
from tilewright.kernels.cpu.memory import cache_bytes

pytestmark = pytest.mark.skipif(native.why_no_native() is not None, reason=f"no C kernels: {native.why_no_native()}")
FOUND = peaks.Peaks(
    torch.get_num_threads(),
    {f"avx2 int8 {torch.get_num_threads()}": 2e11, f"memory {torch.get_num_threads()}": 1e10, "memory 1": 6e9},
    2e-6,
    0.1,
    None,
    "2026-01-02T03:04:05+00:00",
)


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path))


def steady():
    """A clock on which everything takes a hundredth of a second."""
    return itertools.count(0.0, 0.01).__next__


def test_everything_there_is_is_measured(idle_machine: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peaks, "_MOST_MEMORY", 4 << 20)
    found = peaks.measure(steady())
    assert set(found.isas) == {isa for isa in peaks.build.isas() if isa != "portable" and native.supports(isa)}
    assert found.levels[-1] == "memory"
    assert found.threads == torch.get_num_threads() and found.doubt is None and found.date
    for isa in found.isas:
        assert (found.products("bfloat16", isa, 1) > 0) == (isa in ("amx", "avx512_bf16"))
        for dtype, threads in itertools.product(("int8", "float32"), {1, found.threads}):
            assert 0 < found.products(dtype, isa, threads) <= found.products(dtype, None, threads)
    assert found.products("float64") == 0.0
    assert all(found.bandwidth(level, 1) > 0 for level in found.levels)
    assert found.region > 0


@pytest.mark.parametrize("threads", [1, 2])
def test_loops_do_what_they_say(threads: int):
    lanes = {"avx2": 8, "avx_vnni": 8}.get(native.isa(), 16)
    multiply, read = native.function("peak_products"), native.function("peak_read")
    assert multiply(peaks.DTYPES["float32"], 7, threads) == threads * 7 * 12 * lanes * 2
    assert multiply(99, 7, threads) == 0
    memory = torch.zeros(threads * 1024 + 64, dtype=torch.uint8)
    assert read(-(-memory.data_ptr() // 64) * 64, 1024, 3, threads) == threads * 3 * 1024
    assert native.function("peak_regions")(5, threads) == 0


def test_a_busy_machine_is_doubted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peaks, "_MOST_MEMORY", 4 << 20)
    monkeypatch.setattr(CpuClock, "watch", lambda self: lambda: "other processes used 40% of the cores")
    found = peaks.measure(steady())
    assert found.doubt == "other processes used 40% of the cores"
    assert not peaks.store(found) and not peaks.path().exists() and peaks.stored() is None


def test_runs_that_spread_are_doubted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peaks, "_MOST_MEMORY", 4 << 20)
    monkeypatch.setattr(CpuClock, "watch", lambda self: lambda: None)
    uneven = itertools.accumulate(itertools.cycle((0.01, 0.1, 0.03, 0.5)))
    assert "runs spread by" in str(peaks.measure(uneven.__next__).doubt)


def test_what_is_kept_comes_back(monkeypatch: pytest.MonkeyPatch):
    assert peaks.stored() is None
    assert peaks.store(FOUND)
    assert peaks.stored() == FOUND
    table = tables.table_path(peaks._device())
    assert peaks.path().parent == table.parent and not table.exists()
    assert tables.user_tables() == [], "it is no table of choices"


def test_it_holds_for_threads_and_builds(monkeypatch: pytest.MonkeyPatch):
    peaks.store(FOUND)
    peaks.store(dataclasses.replace(FOUND, threads=FOUND.threads + 1))
    assert peaks.stored() == FOUND, "another number of threads is another entry"
    with monkeypatch.context() as changed:
        changed.setattr(peaks.build, "source_hash", lambda: "another")
        assert peaks.stored() is None
    with monkeypatch.context() as changed:
        changed.setattr(torch, "__version__", "9.0")
        assert peaks.stored() is None
    monkeypatch.setenv("TILEWRIGHT_CPU_TABLE", "off")
    assert peaks.stored() is None and not peaks.store(FOUND)


def test_it_lies_beside_a_table_that_the_user_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TILEWRIGHT_CPU_TABLE", str(tmp_path / "mine.json"))
    peaks.store(FOUND)
    assert [path.name for path in tmp_path.glob("*.json")] == ["mine.peaks.json"]


@pytest.mark.parametrize("text", ["{", json.dumps({"format": 1, "entries": {"x": 3}})])
def test_a_bad_file_is_set_aside(text: str):
    peaks.path().write_text(text, encoding="utf-8")
    with pytest.warns(RuntimeWarning, match="was set aside"):
        assert peaks.stored() is None


def test_doctor_shows_what_is_kept(monkeypatch: pytest.MonkeyPatch):
    def shown(measure: bool = False) -> dict[str, str]:
        return {finding.subject: finding.found for finding in doctor._measured(measure)}

    assert "doctor --measure" in shown()["CPU at most"]
    monkeypatch.setattr(peaks, "measure", lambda: dataclasses.replace(FOUND, doubt="it was busy"))
    assert "it was busy" in shown(True)["measured now"] and "doctor --measure" in shown()["CPU at most"]
    monkeypatch.setattr(peaks, "measure", lambda: FOUND)
    assert "written to" in shown(True)["measured now"]
    words = shown()
    assert words["  avx2, GOPS"].endswith("200")
    assert words["  read, GB/s"] == ("memory 6.0 / 10.0" if FOUND.threads > 1 else "memory 6.0")
    assert words["  an empty parallel region"] == "2.00 us"


def test_sizes_of_caches_are_the_systems(tmp_path: Path):
    for index, (level, kind, size) in enumerate([(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2M")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{value}\n", encoding="ascii")
    assert cache_bytes(1, tmp_path) == 48 << 10
    assert cache_bytes(2, tmp_path) == 2 << 20
