"""The C kernels' own tests once more, with every read and write watched by AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.kernels.cpu import build

# Last, -O1 counts: what watches every access takes long to optimise, and sees as much.
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O1")
HERE = Path(__file__).parent
SCRIPT = """
import sys
from pathlib import Path
import pytest
from tilewright.kernels.cpu import build, native
build.LIBRARY = Path(sys.argv[1])
if native.why_no_native() is not None:
    sys.exit(native.why_no_native())
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--import-mode=importlib", *sys.argv[2:]]))
"""


def sanitizer_runtime() -> str:
    """The path of libasan. Skips where there is none: a Python without it cannot load a sanitised library."""
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{compiler} has no AddressSanitizer")
    return path


def run_sanitized(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitizer_runtime(),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # Python and PyTorch keep memory until the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=HERE.parents[1],
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    sanitizer_runtime()
    return str(build.build(tmp_path_factory.mktemp("sanitized") / "_native.so", FLAGS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [
        "test_native.py",
        "test_native_weights.py",
        "test_native_calls.py",
        "test_native_sparse24.py",
        "test_panels.py",
        "test_attention.py",
        "test_row_steps.py",
        "test_decoder_steps.py",
        "test_conv_cpu.py",
        "test_conv_winograd.py",
        "test_conv_tiles.py",
    ],
)
def test_sanitized(library: str, file: str):
    done = run_sanitized(
        SCRIPT,
        library,
        str(HERE / file),
        "-k",
        "not other_sources and not compiler and not python_threads and not pytorchs_own and not onednn",
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_memory_of_replaced_storage_sanitized(library: str):
    done = run_sanitized(
        SCRIPT,
        library,
        str(HERE.parent / "contracts" / "test_replaced_storage.py"),
        "-k",
        "no_grad and not bfloat16 and (test_a_tensor_of_a_layer and (data or share) or test_a_layer and vector)",
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_the_sanitizer_sees_a_read_beyond_the_end(library: str, monkeypatch: pytest.MonkeyPatch):
    # In the build that every processor executes: gcc 12 does not watch the masked loads of AVX-512.
    monkeypatch.setenv("TILEWRIGHT_CPU_ISA", "portable")
    script = """
import ctypes, sys, torch
from pathlib import Path
from tilewright.kernels.cpu import build, native
build.LIBRARY = Path(sys.argv[1])
q, scale = torch.empty(4, 100, dtype=torch.uint8), torch.empty(4)
x = torch.randn(4, 100)
native.quantize_rows(torch.as_strided(x, (4, 100), (100, 1)), torch.ones(90), 0, q, scale)
"""
    done = run_sanitized(script, library)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
