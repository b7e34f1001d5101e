"""Compiles the C kernels into one shared library, each file once for every instruction set.

    python -m tilewright.kernels.cpu.build

Runs when the package is installed (hatch_build.py loads this file by itself, so it imports nothing of the package). The
library has a plain C interface and links with neither Python nor PyTorch: one build serves every version of both. So
does the small extension module beside it, by Python's limited interface.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent / "c"
LIBRARY = FOLDER.with_name("_native.so")
#: The one file that is linked with Python, by its limited interface: a module of its own, which is left out where
#: Python's headers are not installed.
EAGER_SOURCE = "eager.c"
EAGER = FOLDER.with_name("_eager.abi3.so")
#: Built once: what does not depend on the instruction set.
COMMON = ("runtime.c", "conv_zeros.c")
#: Built for each instruction set.
KERNELS = (
    "quantize.c",
    "activate.c",
    "histogram.c",
    "int8_linear.c",
    "int4_int8_linear.c",
    "weight_only.c",
    "linear_call.c",
    "conv_float.c",
    "conv_float_depthwise.c",
    "conv_band.c",
    "conv_winograd.c",
    "conv_int8.c",
    "conv_simple.c",
    "attention.c",
    "attention_few.c",
    "norm.c",
    "elementwise.c",
    "program.c",
    "sparse24.c",
    "dequantize.c",
    "peak.c",
)
HEADERS = tuple(sorted(path.name for path in FOLDER.glob("*.h")))
# No contraction: a multiplication and an addition that are rounded once give other bits than the definition's two.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512", *_AVX2)
_AVX512_BF16 = ("-mavx512bf16", *_AVX512)
#: Instruction sets by preference, with the flags that turn them on.
ISAS: dict[str, tuple[str, ...]] = {
    "amx": ("-mamx-tile", "-mamx-int8", "-mamx-bf16", *_AVX512_BF16),
    "avx512_bf16": _AVX512_BF16,
    "avx512_vnni": _AVX512,
    "avx_vnni": ("-mavxvnni", *_AVX2),
    "avx2": _AVX2,
    "portable": (),
}


# Whether the assembler knows the newest instructions is seen only where one is assembled.
_PROBE = """
#ifdef __AMX_TILE__
#include <immintrin.h>
void probe(void) { _tile_zero(0); _tile_dpbusd(0, 1, 2); _tile_dpbf16ps(0, 1, 2); }
#else
int probe;
#endif
"""


class BuildError(RuntimeError):
    """No compiler, or one that refuses; the message is for the person who installs."""


def source_hash() -> str:
    """Of every C file, in hexadecimal. It is compiled into the library, which so knows whether it is out of date."""
    digest = hashlib.sha256()
    for path in (*(FOLDER / name for name in (*COMMON, *KERNELS, EAGER_SOURCE, *HEADERS)), Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def isas() -> list[str]:
    """Instruction sets that a build on this kind of machine contains, if its compiler knows them all."""
    return list(ISAS) if platform.machine().lower() in ("x86_64", "amd64") else ["portable"]


def find_compiler() -> str:
    """$CC, or the first of cc, gcc and clang on PATH. Raises BuildError."""
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        found = shutil.which(name)
        if found:
            return found
    raise BuildError("there is no C compiler (neither $CC nor cc, gcc or clang on PATH)")


def known_isas(compiler: str) -> list[str]:
    """Those of ``isas`` that the compiler can make. ``portable`` is not asked about: who cannot make it, fails."""

    def knows(isa: str) -> bool:
        command = [compiler, *ISAS[isa], "-x", "c", "-c", "-", "-o", os.devnull]
        return (
            isa == "portable"
            or not subprocess.run(command, input=_PROBE, capture_output=True, text=True, check=False).returncode
        )

    return [isa for isa in isas() if knows(isa)]


def build(output: Path = LIBRARY, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile into ``output`` and return it, without the instruction sets that the compiler is too old for, which the
    library knows. Raises BuildError with the compiler's words.
    """
    if sys.platform != "linux":
        raise BuildError(f"the C kernels are built on Linux only, not on {sys.platform}")
    compiler = find_compiler()
    known = known_isas(compiler)
    about = (f'-DTILEWRIGHT_SOURCE_HASH="{source_hash()}"', f'-DTILEWRIGHT_ISAS=" {" ".join(known)} "')
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(job: tuple[str, str | None]) -> str:
            name, isa = job
            compiled = str(Path(folder) / f"{name}.{isa}.o")
            chosen = (f"-DTILEWRIGHT_ISA={isa}", *ISAS[isa]) if isa else about
            _run([compiler, *FLAGS, *extra_flags, *chosen, "-c", str(FOLDER / name), "-o", compiled])
            return compiled

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [(name, None) for name in COMMON] + list(itertools.product(KERNELS, known))
            objects = list(pool.map(compile_one, jobs))
        _link([compiler, *extra_flags, "-shared", *objects, "-lm"], output)
    return output


def build_eager(output: Path = EAGER) -> Path | None:
    """Compile the extension module into ``output`` and return it; None where there are no headers of Python. Raises
    BuildError.
    """
    headers = Path(sysconfig.get_paths()["include"])
    if platform.python_implementation() != "CPython" or not (headers / "Python.h").is_file():
        output.unlink(missing_ok=True)
        return None
    about = f'-DTILEWRIGHT_SOURCE_HASH="{source_hash()}"'
    _link([find_compiler(), *FLAGS, about, f"-I{headers}", "-shared", str(FOLDER / EAGER_SOURCE)], output)
    return output


def _link(command: list[str], output: Path) -> None:
    """Run a command that makes ``output``. Beside it, so that the last step is a rename: a process that holds the old
    library keeps it whole.
    """
    partial = output.with_name(f"{output.name}.{os.getpid()}")
    try:
        _run([*command, "-o", str(partial)])
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip() or done.stdout.strip()}")


if __name__ == "__main__":
    sys.stdout.write(f"{build()}\n{build_eager() or 'no headers of Python: without _eager'}\n")
