"""Wheels built from this source: with the compiled C kernels where there is a compiler, usable without where not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tilewright.kernels.cpu import build

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "tilewright/kernels/cpu/_native.so"
USE = """
import sys, torch
import tilewright.nn as tnn
from tilewright.commands import doctor
from tilewright.kernels.cpu import choices, native
assert tnn.__file__.startswith(sys.argv[1]), tnn.__file__
assert choices.TABLE.is_file()
layer = tnn.Int8Linear.from_float(torch.nn.Linear(64, 32))
assert torch.isfinite(layer(torch.randn(3, 64))).all()
print(native.why_no_native())
print([finding.found for finding in doctor.examine() if finding.subject.strip() == "what that costs"])
"""


def make_wheel(folder: Path, **environment: str) -> Path:
    """The wheel of a copy of the source, so that a build without a compiler takes no library away."""
    source = folder / "source"
    kept = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "tilewright", source / "tilewright", ignore=kept)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("hatchling, which builds wheels, can be fetched from nowhere")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def use(wheel: Path, folder: Path) -> list[str]:
    """What the package in ``wheel`` says of itself."""
    unpacked = folder / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    command = [sys.executable, "-c", USE, str(unpacked)]
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_wheel_contains_the_compiled_kernels(tmp_path: Path):
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    wheel = make_wheel(tmp_path)
    assert LIBRARY in zipfile.ZipFile(wheel).namelist()
    assert wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")
    assert use(wheel, tmp_path) == ["None", "[]"]


@pytest.mark.slow
def test_without_a_compiler_the_wheel_works_and_says_what_it_lacks(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    wheel = make_wheel(tmp_path, PATH=str(tmp_path / "empty"), CC="")
    assert LIBRARY not in zipfile.ZipFile(wheel).namelist()
    assert wheel.name.endswith("-py3-none-any.whl")
    reason, cost = use(wheel, tmp_path)
    assert "were not compiled when the package was installed" in reason
    assert "times as long" in cost
