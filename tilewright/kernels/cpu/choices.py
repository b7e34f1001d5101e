"""Where another implementation of a linear layer was measured to be faster than the C kernel, by a table.

``choices.csv`` holds, for each operator, instruction set, dtype that is multiplied, batch and shape that was timed, the
milliseconds of the C kernel and of the fastest other implementation; ``python -m bench.tables.choices`` writes it. A
problem looks at the nearest shape and the nearest batch, in powers of two. Layers with an activation or a residual are
not judged by it: the C kernels have them in their epilogue, the others take another pass over the result. An
instruction set without rows takes those of another that has the same instructions for that dtype (``KIN``); else the C
kernel serves it. Weights of few channels, which are far from all that was timed, have a rule of their own (``NARROW``).
All that is the first guess: what was timed on the machine
itself comes before it (``kernels.tuning``), and ``TILEWRIGHT_CPU_TABLE=off`` turns both off.
"""

from __future__ import annotations

import csv
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from tilewright.autotune.folders import cpu_tables_off
from tilewright.kernels.cpu import kept, native, panels
from tilewright.kernels.dispatch.card import card_of
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import Preferred

TABLE = Path(__file__).with_name("choices.csv")
COLUMNS = ("op", "isa", "multiplied", "m", "n", "k", "c_kernel_ms", "other", "other_ms")
#: Factors by which N and K together may differ from a shape that was timed, in powers of two.
FARTHEST = 4.0
#: Another implementation must save at least so much: below, the two are as good as equal.
LEAST_GAIN = 1.05
#: Instruction sets that do the same in a dtype as one with rows.
KIN = {
    ("avx_vnni", "float32"): "avx2",
    ("avx_vnni", "bfloat16"): "avx2",
    ("avx512_bf16", "float32"): "avx512_vnni",
    ("avx512_bf16", "int8"): "avx512_vnni",
}
#: (channels and elements up to which, rows from which on) a float32 product of a widened weight was faster than the C
#: kernels that multiply in float32: these lay out all rows of x for a few channels. One thread of a Xeon (Sapphire
#: Rapids) with AVX-512 / AVX2, of the speed of nn.Linear, by the C kernel and by the widened weight: 10 x 512 at 704
#: rows 0.51 and 0.98 / 0.64 and 0.98, 16 x 768 at 128 rows 0.75 and 1.07 / 0.81 and 1.03.
NARROW = ((63, panels.KEPT_ELEMENTS, 128), (16, math.inf, 128), (63, math.inf, 512))
#: The last one is not for these: 63 x 2048 at 704 rows 1.20 by the C kernel, 0.97 widened.
FOUR_TIMES_EIGHT = ("avx2", "avx_vnni")
WIDENED = "dequantised blocks"
#: Of a weight that is kept dequantised, by its dtype: rows and elements from which on it is faster than the C kernel.
#: One thread of a Xeon (Sapphire Rapids): with AVX-512 and AVX2, 1.02 to 1.08 times at 704 rows of 384 to 2048 columns;
#: with AMX in bfloat16, 1.0 to 1.25 times from 128 rows of 2048 x 2048 and 3072 x 768 on, no faster at 768 x 768.
KEPT = {torch.bfloat16: (128, 1 << 21), torch.float32: (384, 0)}


@dataclass(frozen=True)
class Timed:
    """One row of the table."""

    m: int
    n: int
    k: int
    c_kernel_ms: float
    other: str
    other_ms: float

    def distance(self, problem: Problem) -> tuple[float, float]:
        """How far the shape is from the problem's, then how far the batch, in powers of two."""
        shape = abs(math.log2(self.n / problem.n)) + abs(math.log2(self.k / problem.k))
        return shape, abs(math.log2(self.m / problem.m))


@functools.cache
def _table() -> dict[tuple[str, str, str], list[Timed]]:
    found: dict[tuple[str, str, str], list[Timed]] = {}
    with TABLE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            m, n, k = (int(row[name]) for name in "mnk")
            timed = Timed(m, n, k, float(row["c_kernel_ms"]), row["other"], float(row["other_ms"]))
            found.setdefault((row["op"], row["isa"], row["multiplied"]), []).append(timed)
    return found


def multiplied(problem: Problem) -> str:
    """The dtype that is multiplied, as the table names it."""
    card = card_of(problem.op)
    name = "int8" if card is None or card.integer else problem.multiply_dtype
    return str(name).removeprefix("torch.")


def _nearest(problem: Problem, isa: str, dtype: str) -> Timed | None:
    """What was timed that is nearest to ``problem``, if anything is near."""
    rows = _table().get((problem.op, isa, dtype), [])
    found = min(rows, key=lambda row: row.distance(problem), default=None)
    return None if found is None or found.distance(problem)[0] > FARTHEST else found


def _kept(problem: Problem) -> Preferred | None:
    """A weight that is kept dequantised, where that is faster than the C kernel."""
    held = kept.held_dtype(problem.x_dtype, problem.compute_dtype)
    if held is None:
        return None
    if held == torch.float32 and (native.isa() == "amx" or problem.activation != "none" or problem.residual):
        return None  # AMX, and the C kernel's epilogue, save more than the library does
    rows, elements = KEPT[held]
    if problem.m < rows or problem.n * problem.k < elements:
        return None
    words = f"a weight that is kept dequantised is faster from {rows} rows on"
    return Preferred(kept.NAME, words, "shipped rule")


def _is_narrow(problem: Problem) -> bool:
    card = card_of(problem.op)
    if card is None or card.integer or problem.x_dtype != torch.float32:
        return False
    if not panels.takes(problem.x_dtype, problem.compute_dtype):
        return False
    rules = NARROW[:-1] if native.isa() in FOUR_TIMES_EIGHT else NARROW
    m, n, size = problem.m, problem.n, problem.n * problem.k
    return any(n <= channels and size <= elements and m >= rows for channels, elements, rows in rules)


def faster(problem: Problem) -> Preferred | None:
    """The implementation that is faster than the C kernel, and the words for it; None where none is known to be."""
    if problem.device != "cpu" or 0 in (problem.m, problem.n, problem.k) or native.why_no_native():
        return None
    if cpu_tables_off():
        return None
    if problem.keep_dequantized and (found := _kept(problem)) is not None:
        return found
    if problem.activation != "none" or problem.residual:
        return None
    dtype = multiplied(problem)
    if _is_narrow(problem):
        words = f"{WIDENED} are faster where a weight has few channels, from some rows on"
        return Preferred(WIDENED, words, "shipped rule")
    nearest = _nearest(problem, native.isa(), dtype) or _nearest(problem, KIN.get((native.isa(), dtype), ""), dtype)
    if nearest is None:
        return None
    gain = nearest.c_kernel_ms / nearest.other_ms
    if gain < LEAST_GAIN:
        return None
    size = f"{nearest.m} x {nearest.n} x {nearest.k}"
    words = f"{nearest.other} was {gain:.2f} times as fast at {size} (M x N x K)"
    return Preferred(nearest.other, words, "shipped table")
