"""Where another implementation of a linear layer was measured to be faster than the C kernel, by a table.

``choices.csv`` holds, for each operator, instruction set, dtype that is multiplied, batch and shape that was timed, the
milliseconds of the C kernel and of the fastest other implementation; ``python -m bench.tables.choices`` writes it. A
problem looks at the nearest shape and the nearest batch, in powers of two. Layers with an activation or a residual are
not judged by it: the C kernels have them in their epilogue, the others take another pass over the result. Nor are other
instruction sets than those of the table: the C kernel serves them. It is the first guess: what was timed on the machine
itself comes before it (``kernels.tuning``), and ``TILEWRIGHT_CPU_TABLE=off`` turns both off.
"""

from __future__ import annotations

import csv
import functools
import math
from dataclasses import dataclass
from pathlib import Path

from tilewright.autotune.folders import cpu_tables_off
from tilewright.kernels.cpu import native
from tilewright.kernels.dispatch.card import card_of
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import Preferred

TABLE = Path(__file__).with_name("choices.csv")
COLUMNS = ("op", "isa", "multiplied", "m", "n", "k", "c_kernel_ms", "other", "other_ms")
#: Factors by which N and K together may differ from a shape that was timed, in powers of two.
FARTHEST = 4.0
#: Another implementation must save at least so much: below, the two are as good as equal.
LEAST_GAIN = 1.05


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


def faster(problem: Problem) -> Preferred | None:
    """The implementation that is faster than the C kernel, and the words for it; None where none is known to be."""
    if problem.device != "cpu" or 0 in (problem.m, problem.n, problem.k) or native.why_no_native():
        return None
    if cpu_tables_off():
        return None
    if problem.activation != "none" or problem.residual:
        return None
    rows = _table().get((problem.op, native.isa(), multiplied(problem)), [])
    nearest = min(rows, key=lambda row: row.distance(problem), default=None)
    if nearest is None or nearest.distance(problem)[0] > FARTHEST:
        return None
    gain = nearest.c_kernel_ms / nearest.other_ms
    if gain < LEAST_GAIN:
        return None
    size = f"{nearest.m} x {nearest.n} x {nearest.k}"
    words = f"{nearest.other} was {gain:.2f} times as fast at {size} (M x N x K)"
    return Preferred(nearest.other, words, "shipped table")
