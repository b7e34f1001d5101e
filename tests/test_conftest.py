"""The summary of a run says what was skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOME_TESTS = """
import pytest

@pytest.mark.parametrize("i", range(3))
def test_a(i): pytest.skip("needs a lathe")

@pytest.mark.skipif(True, reason="needs a kiln")
def test_b(): pass

@pytest.mark.skip
def test_c(): pass

def test_d(): pass
"""


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["alone", "in two processes"])
def test_the_summary_has_each_reason_once_with_its_count(options: list[str], tmp_path: Path) -> None:
    if options:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    (tmp_path / "test_other.py").write_text("import pytest\npytest.importorskip('x_y_z', reason='needs a loom')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "tests.conftest", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    begin = next(i for i, line in enumerate(lines) if "6 skipped" in line and line.startswith("="))
    assert lines[begin + 1 : begin + 5] == [
        "     3  needs a lathe",
        "     1  needs a kiln",
        "     1  needs a loom",
        "     1  unconditional skip",
    ]
