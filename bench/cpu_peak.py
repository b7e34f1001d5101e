"""The ceilings that a CPU's figures are held against, measured: int8 products a second and bytes read from memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from tilewright.kernels.cpu import build, native

SOURCE = Path(__file__).with_name("cpu_peak.c")
MEMORY_BYTES = 512 << 20  # far beyond any last-level cache of the machines this runs on


@dataclass(frozen=True)
class Peak:
    """int8: integer operations a second, a product and its addition being two; memory: bytes read a second."""

    int8: float
    memory: float


def measure(cores: list[int]) -> Peak:
    """The best of several runs of one thread on each of ``cores``. Raises RuntimeError where there are no C kernels."""
    threads = len(cores)
    flags = build.ISAS[native.isa()]
    with tempfile.TemporaryDirectory() as folder:
        library_path = Path(folder) / "peak.so"
        command = [build.find_compiler(), "-O3", "-shared", "-fPIC", *flags, str(SOURCE), "-o", str(library_path)]
        subprocess.run(command, check=True, capture_output=True)
        library = ctypes.CDLL(str(library_path))
    for function in (library.peak_int8, library.read_memory):
        function.restype = ctypes.c_int64
    library.peak_int8.argtypes = (ctypes.c_int64,)
    library.read_memory.argtypes = (ctypes.c_void_p, ctypes.c_int64)

    def on_core(i: int, function: Callable[..., int], *arguments: int) -> int:
        os.sched_setaffinity(0, {cores[i]})  # of this thread alone; two on one core would measure one core
        return function(*arguments)

    parts = torch.ones(MEMORY_BYTES, dtype=torch.uint8).chunk(threads)
    with ThreadPoolExecutor(threads) as pool:  # ctypes releases the interpreter's lock

        def best(work: Callable[[int], int], amount: Callable[[list[int]], int]) -> float:
            rates = []
            for _ in range(7):
                start = time.perf_counter()
                done = list(pool.map(work, range(threads)))
                rates.append(amount(done) / (time.perf_counter() - start))
            return max(rates)

        int8 = best(lambda i: on_core(i, library.peak_int8, 10_000_000), sum)
        memory = best(
            lambda i: on_core(i, library.read_memory, parts[i].data_ptr(), parts[i].numel()),
            lambda _: sum(map(len, parts)),
        )
    return Peak(int8, memory)
