"""Times the C kernels of linear layers against the other implementations of their operators, for the router's table.

    TILEWRIGHT_CPU_ISA=ISA python -m bench.tables.choices [--shape N K ...] [--batches M ...] [--write]

Turns of half a millisecond, of whose calls the fastest quarter counts. ``--write`` puts what was timed into
``tilewright/kernels/cpu/choices.csv``, in place of the rows of the same operator, instruction set, dtype, shape and
batch. With an instruction set that is not the processor's best, PyTorch's libraries are held to it too.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable, Iterator
from typing import Any

from bench import isas

os.environ.setdefault("OMP_PROC_BIND", "true")
if forced := os.environ.get("TILEWRIGHT_CPU_ISA"):
    isas.hold(forced)

import torch
from torch import nn

import tilewright.nn as tnn
from bench.timer import interleaved
from tilewright.kernels.cpu import choices, native
from tilewright.kernels.dispatch.card import make_arguments
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import implementations
from tilewright.kernels.layer_trials import layer_call

THREADS = 2
SHAPES = (
    *((256, 256), (384, 384), (192, 768), (1536, 384), (384, 1536)),
    *((768, 768), (3072, 768), (768, 3072), (2048, 2048), (4096, 4096)),
)
BATCHES = (1, 4, 16, 64, 128, 512)
C_KERNEL = "C kernel"
#: Neither is meant to be fast.
LEFT_OUT = ("reference", "exact float32", "dequantise and multiply")
Row = dict[str, object]


def layers(n: int, k: int) -> Iterator[Any]:
    """One layer for each operator and dtype that is multiplied."""
    linear = nn.Linear(k, n)
    yield tnn.Int8Linear.from_float(linear)
    yield tnn.Int8ActInt4WeightLinear.from_float(linear, group_size=128, range_search="minmax")
    for dtype in (torch.bfloat16, torch.float32):
        yield tnn.Int8WeightOnlyLinear.from_float(linear, compute_dtype=dtype)
        yield tnn.Int4Linear.from_float(linear, group_size=128, range_search="minmax", compute_dtype=dtype)


def measure(n: int, k: int, batches: list[int], seconds: float) -> Iterator[Row]:
    """A row for each layer and batch that the C kernel and another implementation take."""
    torch.manual_seed(0)
    with torch.inference_mode():
        for layer in layers(n, k):
            for m in batches:
                problem = layer.problem(m)
                functions = _functions(problem, make_arguments(problem))
                if C_KERNEL not in functions or len(functions) < 2:
                    continue
                times = interleaved(functions, seconds=seconds, rounds=4, turn=0.0005, waking=2, shuffle=True).times
                found = {name: 1e3 * timing.fastest for name, timing in times.items()}
                ours = found.pop(C_KERNEL)
                other = min(found, key=lambda name: found[name])
                values = (problem.op, native.isa(), choices.multiplied(problem), m, n, k)
                times = (f"{ours:.4f}", other, f"{found[other]:.4f}")
                yield dict(zip(choices.COLUMNS, (*values, *times), strict=True))


def _functions(problem: Problem, arguments: dict[str, Any]) -> dict[str, Callable[[], object]]:
    return {
        other.name: layer_call(other, arguments)
        for other in implementations(problem.op)
        if other.name not in LEFT_OUT and other.why_not(problem) is None
    }


def write(rows: list[Row]) -> None:
    """Into the table, in place of older rows of the same problems."""
    key = choices.COLUMNS[:6]
    known = {}
    if choices.TABLE.is_file():
        with choices.TABLE.open(newline="", encoding="utf-8") as file:
            known = {tuple(row[name] for name in key): row for row in csv.DictReader(file)}
    known |= {tuple(str(row[name]) for name in key): row for row in rows}  # type: ignore[misc]
    with choices.TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, choices.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(known.values())


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=2, type=int, action="append", metavar=("N", "K"))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=0.1, help="for each row; default: 0.1")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows = []
    for n, k in options.shape or SHAPES:
        for row in measure(n, k, options.batches, options.seconds):
            rows.append(row)
            print(*row.values(), flush=True)
    if options.write:
        write(rows)


if __name__ == "__main__":
    main()
