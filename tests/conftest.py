"""Collection rules of the whole suite: what cannot run here is skipped or left out with its reason."""

from __future__ import annotations

import collections
import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
import torch

OPTIONAL_TEST_PACKAGES = tuple(
    name for name in ("hypothesis", "pytest_benchmark") if not importlib.util.find_spec(name)
)
left_out: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """What somebody tuned on this machine must not decide which kernels are tested, nor a test leave anything there."""
    folder = tempfile.TemporaryDirectory(prefix="tilewright-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ["TILEWRIGHT_CACHE_DIR"] = folder.name
    # Nor must which kernels are tested depend on how fast they are: conversions time nothing unasked.
    os.environ["TILEWRIGHT_AUTOTUNE"] = "0"
    os.environ.pop("TILEWRIGHT_CPU_TABLE", None)


@pytest.fixture
def idle_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is done with times: whatever else this machine does, its times count."""
    monkeypatch.setattr("tilewright.autotune.clock.CpuClock.watch", lambda self: lambda: None)
    monkeypatch.setattr("tilewright.autotune.racing.MOST_SPREAD", float("inf"))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out test files that need a test package this Python lacks, as on a bare GPU machine (`make gpu`)."""
    if collection_path.suffix != ".py" or not OPTIONAL_TEST_PACKAGES:
        return None
    source = collection_path.read_text(encoding="utf-8")
    if any(f"import {name}" in source or f"from {name}" in source for name in OPTIONAL_TEST_PACKAGES):
        left_out.append(collection_path.name)
        return True
    return None


def pytest_report_collectionfinish() -> list[str]:
    if not left_out:
        return []
    return [f"left out for want of {' and '.join(OPTIONAL_TEST_PACKAGES)}: {', '.join(sorted(left_out))}"]


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test or a file was skipped, as its author wrote it."""
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    lines = text.removeprefix("Skipped: ").strip().splitlines()  # Hypothesis adds the example to the reason
    return lines[0] if lines else "NO REASON GIVEN"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """End with what was skipped: each reason once, with the number of tests it kept from running."""
    counts = collections.Counter(skip_reason(report) for report in terminalreporter.stats.get("skipped", ()))
    if not counts:
        return
    terminalreporter.section(f"{counts.total()} skipped")
    for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        terminalreporter.write_line(f"{count:6}  {reason}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
        for item in gpu_items:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same random numbers whatever ran before it."""
    torch.manual_seed(0)
