"""The C kernels as Python functions: which library, which instruction set, which threads.

``TILEWRIGHT_CPU_ISA`` forces one of ``build.ISAS``, or ``off``. The portable build is used only where it is forced:
PyTorch's own vectorised operators are faster (quantising 704 x 1536: 0.56 ms against 0.35 ms). Threads are those of
PyTorch's own OpenMP runtime, as many as ``torch.get_num_threads`` says; ctypes releases the interpreter's lock while a
kernel runs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tilewright.kernels.activation import TABLE
from tilewright.kernels.cpu import build
from tilewright.kernels.dispatch import repeated

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Those that the kernels of linear layers have, by their numbers in C.
ACTIVATIONS = {row.name: row.number for row in TABLE.values() if "linear" in row.native}
#: Below this many elements a second thread costs more than it brings (PyTorch's own grain size).
_GRAIN = 32768
#: Tables of counts that a thread fills in turns.
_HISTOGRAM_TURNS = 4

_TYPES = {"p": ctypes.c_void_p, "c": ctypes.c_int64, "n": ctypes.c_int, "f": ctypes.c_float}
#: Of each C function: p is a pointer, c a count of 64 bits, n a number of 32, f a float. Those without "->" return 0
#: or what went wrong.
_SIGNATURES = {
    "run_steps": "p c n",
    "conv_lanes": "-> n",
    "quantize_rows": "p n ccc p n pp n",
    "activate": "p c nn",
    "histogram": "p c f c p n",
    "panel": "-> c",
    "int8_packed_bytes": "cc -> c",
    "int8_row_bytes": "c -> c",
    "int8_rows": "c -> c",
    "int8_pack": "p cc pp",
    "int8_linear": "pp cc ppp p n cc p n ppp c nn",
    "int4_packed_bytes": "cc -> c",
    "int4_scales": "cc -> c",
    "int4_pack": "ppp ccc ppp",
    "int4_int8_row_bytes": "c -> c",
    "int4_int8_linear": "ppp ccc pp p n cc p n pppp c nn",
    "attention_scratch": "p -> c",
    "attention": "p",
    "sparse24_channels": "-> c",
    "sparse24_linear": "pp cc pp n",
    "weight_only_row_bytes": "n ccc -> c",
    "weight_only_pack": "n ppp ccc ppp",
    "weight_only_linear": "n ppp ccc pp n cc p n p n pp c nn",
    "dequantize": "n ppp cccccc p n",
    "peak_products": "n c n -> c",
    "peak_read": "p cc n -> c",
    "peak_regions": "c n",
    "call_int8_linear": "p pp p",
    "call_int4_int8_linear": "p pp p",
    "call_weight_only_linear": "p pp p",
}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and the instruction set, or None and the reason."""
    required = os.environ.get("TILEWRIGHT_CPU_ISA", "").lower()
    if required == "off":
        return None, "the C kernels are turned off by TILEWRIGHT_CPU_ISA"
    if required and required not in build.ISAS:
        raise ValueError(f"TILEWRIGHT_CPU_ISA={required} is unknown; the known ones are {', '.join(build.ISAS)}, off")
    if not build.LIBRARY.is_file():
        return None, "the C kernels were not compiled when the package was installed (no C compiler, or not on Linux)"
    try:
        library = ctypes.CDLL(str(build.LIBRARY))
        library.tw_source_hash.restype = ctypes.c_char_p
        if library.tw_source_hash().decode() != build.source_hash():
            return None, "the C kernels were compiled from other sources: install the package again"
        _share_threads(library)
    except (OSError, AttributeError) as error:
        return None, f"the C kernels cannot be loaded: {error}"
    for isa in [required] if required else build.isas():
        if (required or isa != "portable") and library.tw_supports(isa.encode()):
            return library, isa
    if required and not library.tw_has(required.encode()):
        raise ValueError(f"TILEWRIGHT_CPU_ISA={required}: the compiler that built the C kernels did not know it")
    if required:
        raise ValueError(f"TILEWRIGHT_CPU_ISA={required}: this processor cannot execute it")
    return None, "this processor has none of the instruction sets that the C kernels are built for"


def _share_threads(library: ctypes.CDLL) -> None:
    # Looked up through PyTorch's library, a symbol is found in the very OpenMP runtime that it was linked with.
    runtime = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
    library.tw_use_openmp(*(ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in names))


def why_no_native() -> str | None:
    """Why the C kernels cannot be used, or None. Raises ValueError where TILEWRIGHT_CPU_ISA asks for what is not
    there.
    """
    library, reason = _load()
    return reason if library is None else None


def isa() -> str:
    """The instruction set in use. Raises RuntimeError with the reason where there is none."""
    library, name = _load()
    if library is None:
        raise RuntimeError(name)
    return name


def supports(isa: str) -> bool:
    """Whether this processor can execute the build called ``isa``; False where there are no C kernels."""
    library, _ = _load()
    return library is not None and bool(library.tw_supports(isa.encode()))


@functools.cache
def eager() -> tuple[Any, str | None]:
    """The extension module for calls of layers that repeat, or None and the reason."""
    if not build.EAGER.is_file():
        return None, "it was not built when the package was installed (no C compiler, no headers of Python)"
    try:
        module = importlib.import_module("tilewright.kernels.cpu._eager")
    except ImportError as error:
        return None, f"it cannot be loaded: {error}"
    if build.source_hash() != module.SOURCE_HASH:
        return None, "it was compiled from other sources: install the package again"
    return module, None


repeated.load = eager


@functools.cache
def layout(name: str) -> str:
    """``name`` of a weight's order, made unique to the instruction set in use."""
    return f"native {name} {isa()}"


@functools.cache
def function(name: str, of: str | None = None) -> Callable[..., int]:
    """The C function ``tw_<name>`` of the instruction set in use, or of another that ``supports`` knows. Raises
    RuntimeError where there are no C kernels.
    """
    library, _ = _load()
    found = getattr(library, f"tw_{name}_{of or isa()}")
    taken, _, returned = _SIGNATURES[name].partition("->")
    found.argtypes = [_TYPES[each] for each in taken if each != " "]
    found.restype = _TYPES[returned.strip() or "n"]
    return found


def reload() -> None:
    """Choose the library and the instruction set anew, after TILEWRIGHT_CPU_ISA has changed."""
    for cached in (_load, layout, function):
        cached.cache_clear()


def quantize_rows(
    x: torch.Tensor, channel_scale: torch.Tensor | None, zero_point: int, q: torch.Tensor, scale: torch.Tensor
) -> bool:
    """Quantise ``x`` float [M, K] into ``q`` (one byte an element, [M, K]) and ``scale`` float32 [M], both contiguous.

    channel_scale: contiguous float32 [K]. Returns False, having done nothing, where there is no C kernel for it.
    """
    if why_no_native() or x.dtype not in DTYPES:
        return False
    if x.stride(1) != 1:
        x = x.contiguous()
    m, k = x.shape
    threads = torch.get_num_threads() if m * k >= _GRAIN else 1
    rows = (x.data_ptr(), DTYPES[x.dtype], m, k, x.stride(0))
    factors = None if channel_scale is None else channel_scale.data_ptr()
    return function("quantize_rows")(*rows, factors, zero_point, q.data_ptr(), scale.data_ptr(), threads) == 0


def activate(y: torch.Tensor, name: str) -> bool:
    """Put float32 ``y``, contiguous or channels-last, through the activation called ``name``, in place, each number as
    if it stood alone.

    Returns False, having done nothing, where there is no C kernel for it.
    """
    if why_no_native() or name not in ACTIVATIONS or y.dtype != torch.float32:
        return False
    if not (y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)):
        return False
    threads = torch.get_num_threads() if y.numel() >= _GRAIN else 1
    return function("activate")(y.data_ptr(), y.numel(), ACTIVATIONS[name], threads) == 0


def histogram(x: torch.Tensor, bins: int, limit: float) -> torch.Tensor | None:
    """``torch.histc(x, bins, -limit, limit)`` of float32 ``x``, all of it within these limits, as int64 [bins].

    None where there is no C kernel for it.
    """
    few = x.numel() < 2**31  # which is what its counts are sure to hold
    if why_no_native() or x.dtype != torch.float32 or not x.is_cpu or not x.is_contiguous() or not few:
        return None
    threads = torch.get_num_threads() if x.numel() >= _GRAIN else 1
    counts = torch.zeros(threads, _HISTOGRAM_TURNS, bins, dtype=torch.int32)
    function("histogram")(x.data_ptr(), x.numel(), limit, bins, counts.data_ptr(), threads)
    return counts.sum((0, 1))
