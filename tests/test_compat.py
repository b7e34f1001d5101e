"""The package works under other versions of Triton, PyTorch and Python than the pinned ones.

`make compat` installs other Tritons, each into a folder `.compat/triton-VERSION` of its own that is put before
site-packages, and runs this file. Other PyTorches are tried when the variable TILEWRIGHT_COMPAT_PYTHONS lists
interpreters that have them (separated as PATH is). Each trial is a process of its own.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "tilewright").rglob("*.py"))
OTHER_TRITONS = ("3.4.0", "3.6.0", "3.9.0")
OTHER_PYTHONS = [path for path in os.environ.get("TILEWRIGHT_COMPAT_PYTHONS", "").split(os.pathsep) if path]
OLDEST_PYTHON = "python3.10"

# int8 rounds weights and activations to about 1 part in 127 of the largest, int4 weights to about 1 part in 15: the
# error of two layers of random weights lies near 0.01 and 0.09. A broken layer is off by about 1.
CONVERT_AND_RUN = """
import torch
from torch import nn
import tilewright as tw

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 48), nn.LayerNorm(48))
x = torch.randn(5, 96)
expected = model(x)
for recipe, most in ("int8", 0.03), ("int4-g32", 0.25):
    converted = tw.convert_model(model, recipe)
    left = [name for name, module in converted.named_modules() if type(module) is nn.Linear]
    error = float((converted(x) - expected).norm() / expected.norm())
    print(recipe, "error", error, "left alone", left)
    if left or not 0 < error < most:
        raise SystemExit("the converted model is wrong")
"""

COMPILE_KERNELS = """
import torch, triton
from tilewright.aot.compiler import compile_launch
from tilewright.kernels.int8_linear.triton_tile import plan_tile
from tilewright.kernels.quantize.triton_quantize import plan_quantize_per_row

m, n, k = 64, 128, 256
x, q = torch.empty(m, k, dtype=torch.float16), torch.empty(m, k, dtype=torch.int8)
scale, weight_scale = torch.empty(m), torch.empty(n)
weight, out = torch.empty(n, k, dtype=torch.int8), torch.empty(m, n, dtype=torch.float16)
launches = [
    *plan_quantize_per_row(x, None, q, scale),
    *plan_tile(q, scale, weight, weight_scale, out, bias=None, residual=None, activation="gelu"),
]
for target in "sm_80", "sm_90":
    for launch in launches:
        compiled = compile_launch(launch, target)
        print(launch.kernel.__name__, target, compiled.registers, compiled.spill_bytes, *compiled.over_limits)
        if compiled.over_limits:
            raise SystemExit("the kernel could not be launched")
print("compiled with triton", triton.__version__)
"""


def run_python(python: str, code: str, cache: Path, *first_on_path: Path) -> str:
    """What ``code`` prints in a fresh interpreter with these folders before its site-packages; fails if it fails."""
    path = os.pathsep.join(map(str, (*first_on_path, ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [python, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def triton_folder(version: str) -> Path:
    folder = ROOT / ".compat" / f"triton-{version}"
    if not folder.is_dir():
        pytest.skip(f"triton {version} is not under .compat/ (make compat puts it there)")
    return folder


@pytest.mark.parametrize("version", OTHER_TRITONS)
def test_converts_and_runs_with_another_triton(version: str, tmp_path: Path) -> None:
    loaded = "\nimport triton\nprint('triton', triton.__version__)"
    printed = run_python(sys.executable, CONVERT_AND_RUN + loaded, tmp_path, triton_folder(version))
    assert f"triton {version}" in printed


@pytest.mark.aot
@pytest.mark.parametrize("version", OTHER_TRITONS)
def test_compiles_kernels_with_another_triton(version: str, tmp_path: Path) -> None:
    assert f"compiled with triton {version}" in run_python(
        sys.executable, COMPILE_KERNELS, tmp_path, triton_folder(version)
    )


@pytest.mark.skipif(not OTHER_PYTHONS, reason="TILEWRIGHT_COMPAT_PYTHONS names no interpreter")
@pytest.mark.parametrize("python", OTHER_PYTHONS or ["none"])
def test_converts_and_runs_with_another_python(python: str, tmp_path: Path) -> None:
    run_python(python, CONVERT_AND_RUN, tmp_path)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_is_in_the_grammar_of_python_3_10(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


def test_the_oldest_python_compiles_every_file() -> None:
    """Stricter than the grammar above, which lets some newer f-strings pass."""
    python = shutil.which(OLDEST_PYTHON)
    if not python or subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip(f"no working {OLDEST_PYTHON} on PATH")
    code = "import sys\nfor name in sys.argv[1:]:\n    compile(open(name, encoding='utf-8').read(), name, 'exec')"
    done = subprocess.run([python, "-c", code, *map(str, SOURCES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
