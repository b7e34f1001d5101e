"""The C kernels as Python functions: which library, which instruction set, which threads.

``TILEWRIGHT_CPU_ISA`` forces one of ``build.ISAS``, or ``off``. The portable build is used only where it is forced:
PyTorch's own vectorised operators are faster (quantising 704 x 1536: 0.56 ms against 0.35 ms). Threads are those of
PyTorch's own OpenMP runtime, as many as ``torch.get_num_threads`` says; ctypes releases the interpreter's lock while a
kernel runs.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tilewright.kernels.cpu import build
from tilewright.kernels.cpu_support import scratch
from tilewright.kernels.packed import packed

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
#: Below this many elements a second thread costs more than it brings (PyTorch's own grain size).
_GRAIN = 32768
#: Bytes of quantised activations that are multiplied before the next rows are quantised.
_BLOCK_BYTES = 4 << 20

_POINTER, _COUNT, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "run_steps": (_POINTER, _COUNT, _NUMBER),
    "conv_lanes": (),
    "conv_int8": (),
    "quantize_rows": (_POINTER, _NUMBER, *[_COUNT] * 3, _POINTER, _NUMBER, *[_POINTER] * 2, _NUMBER),
    "int8_packed_bytes": (_COUNT, _COUNT),
    "panel": (),
    "int8_pack": (_POINTER, _COUNT, _COUNT, _POINTER, _POINTER),
    "int8_linear": (
        *[_POINTER] * 2,
        *[_COUNT] * 2,
        *[_POINTER] * 4,
        _NUMBER,
        *[_COUNT] * 2,
        _POINTER,
        _NUMBER,
        *[_POINTER] * 3,
        _COUNT,
        _NUMBER,
    ),
}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and the instruction set, or None and the reason."""
    wanted = os.environ.get("TILEWRIGHT_CPU_ISA", "").lower()
    if wanted == "off":
        return None, "the C kernels are turned off by TILEWRIGHT_CPU_ISA"
    if wanted and wanted not in build.ISAS:
        raise ValueError(f"TILEWRIGHT_CPU_ISA={wanted} is unknown; the known ones are {', '.join(build.ISAS)}, off")
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
    for isa in [wanted] if wanted else build.isas():
        if (wanted or isa != "portable") and library.tw_supports(isa.encode()):
            return library, isa
    if wanted:
        raise ValueError(f"TILEWRIGHT_CPU_ISA={wanted}: this processor cannot execute it")
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


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    """The C function ``tw_<name>`` built for the instruction set in use, or None where there are no C kernels."""
    library, instruction_set = _load()
    if library is None:
        return None
    function = getattr(library, f"tw_{name}_{instruction_set}")
    function.argtypes = _SIGNATURES[name]
    function.restype = ctypes.c_int64 if name in ("int8_packed_bytes", "panel") else ctypes.c_int
    return function


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def quantize_rows(
    x: torch.Tensor, channel_scale: torch.Tensor | None, zero_point: int, q: torch.Tensor, scale: torch.Tensor
) -> bool:
    """Quantise ``x`` float [M, K] into ``q`` (one byte an element, [M, K]) and ``scale`` float32 [M], both contiguous.

    channel_scale: contiguous float32 [K]. Returns False, having done nothing, where there is no C kernel for it.
    """
    function, dtype = _function("quantize_rows"), DTYPES.get(x.dtype)
    if function is None or dtype is None:
        return False
    if x.stride(1) != 1:
        x = x.contiguous()
    m, k = x.shape
    threads = torch.get_num_threads() if m * k >= _GRAIN else 1
    done = function(
        x.data_ptr(),
        dtype,
        m,
        k,
        x.stride(0),
        _address(channel_scale),
        zero_point,
        q.data_ptr(),
        scale.data_ptr(),
        threads,
    )
    return done == 0


def _pack_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    size, panel, pack = _function("int8_packed_bytes"), _function("panel"), _function("int8_pack")
    if size is None or panel is None or pack is None:
        raise RuntimeError(why_no_native())
    n, k = weight.shape
    # Both are read with whole vectors: torch aligns memory to 64 bytes.
    values = torch.empty(size(n, k), dtype=torch.int8)
    correction = torch.empty(-(-n // panel()) * panel(), dtype=torch.int32)
    pack(weight.contiguous().data_ptr(), n, k, values.data_ptr(), correction.data_ptr())
    return values, correction


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    channel_scale: torch.Tensor | None,
) -> torch.Tensor:
    """``int8_linear.reference`` for x float [M, K] of one of ``DTYPES`` and an activation of ``ACTIVATIONS``; no
    dimension is 0, and the C kernels are there.
    """
    function = _function("int8_linear")
    if function is None:
        raise RuntimeError(why_no_native())
    if x.stride(1) != 1:
        x = x.contiguous()
    m, k = x.shape
    n = len(weight)
    values, correction = packed(weight, f"native-int8-{_load()[1]}", lambda: _pack_int8(weight))
    kept: list[Any] = []  # converted tensors must live until the kernel has read them

    def floats(tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            tensor = tensor.float().contiguous()
            kept.append(tensor)
        return tensor.data_ptr()

    if residual is not None:
        residual = residual.reshape(m, n).to(x.dtype).contiguous()
    stride = -(-k // 4) * 4
    block = min(m, max(1, _BLOCK_BYTES // stride))
    y = torch.empty(m, n, dtype=x.dtype)
    function(
        values.data_ptr(),
        correction.data_ptr(),
        n,
        k,
        floats(weight_scale),
        floats(bias),
        floats(channel_scale),
        x.data_ptr(),
        DTYPES[x.dtype],
        m,
        x.stride(0),
        _address(residual),
        ACTIVATIONS[activation],
        y.data_ptr(),
        scratch((block * stride,), torch.uint8, "quantized").data_ptr(),
        scratch((block,), torch.float32, "row scale").data_ptr(),
        block,
        torch.get_num_threads() if m * n * k >= _GRAIN else 1,
    )
    return y
