"""What the compiled code of a table row does when it runs, counted on an emulated GPU over a small problem.

A row's kernel was compiled for large tensors. The same binary serves small ones of equal specialisation, and what is
counted for each access and each step along K does not depend on the size. The main loop is what a deeper problem
executes more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tilewright.aot.compiler import EMULATED, compile_launch
from tilewright.aot.emulator import Stats
from tilewright.aot.launch import Launch
from tilewright.aot.targets import Target

#: Columns of K that ``matrix_per_step`` is counted for.
STEP = 64


@dataclass(frozen=True)
class Counts:
    """read_bytes, read_sectors: what one access of a warp to global memory reads, on average, and the 32-byte sectors
    it touches. read_excess, write_excess: sectors by the fewest possible. shared_excess: wavefronts of shared memory by
    the fewest possible. matrix_per_step: matrix instructions, by a warp or by a warp group, that one block executes in
    the main loop for 64 columns of K. issue_per_matrix: instructions of any kind for each of them, by a warp. Where the
    depth is fixed by the code, as in a stem's window, both are of the whole kernel, which has no other loop.
    """

    read_bytes: float | None = None
    read_sectors: float | None = None
    read_excess: float | None = None
    write_excess: float | None = None
    shared_excess: float | None = None
    matrix_per_step: float | None = None
    issue_per_matrix: float | None = None


@dataclass(frozen=True)
class Small:
    """A launch over CPU tensors that compiles to the binary of a table row. depth: columns of K; of a product alone."""

    launch: Launch
    depth: int = 0


def count(small: Callable[[int], Small | None], target: Target) -> Counts:
    """Emulate the launches that ``small`` makes: ``small(1)``, and ``small(2)``, a deeper one or None.

    All fields are None where the target cannot be emulated, or no small problem has the same binary.
    """
    if target.backend != "cuda" or target.arch not in EMULATED:
        return Counts()
    first = small(1)
    if first is None:
        return Counts()
    stats = _emulate(first.launch, target)
    reads = max(stats.accesses["read"], 1)
    found = {
        "read_bytes": stats.global_bytes["read"] / reads,
        "read_sectors": stats.sectors["read"] / reads,
        "read_excess": stats.sectors_over_ideal("read"),
        "write_excess": stats.sectors_over_ideal("written"),
        "shared_excess": stats.wavefronts_over_ideal,
    }
    if stats.matrix_instructions:
        matrix, issued, by_warp, depth = stats.matrix_instructions, stats.instructions, _by_warp(stats), first.depth
        second = small(2)
        if second is not None:
            deeper = _emulate(second.launch, target)
            matrix, issued = deeper.matrix_instructions - matrix, deeper.instructions - issued
            by_warp, depth = _by_warp(deeper) - by_warp, second.depth - depth
        found["matrix_per_step"] = matrix / stats.ctas * STEP / depth
        found["issue_per_matrix"] = issued / by_warp
    return Counts(**{name: _rounded(value) for name, value in found.items()})


def _emulate(launch: Launch, target: Target) -> Stats:
    return compile_launch(launch, target).emulate(launch.grid, launch.args)


def _by_warp(stats: Stats) -> int:
    return sum(number * (4 if kind == "wgmma" else 1) for kind, number in stats.matrix.items())


def _rounded(value: float) -> float:
    """Three significant digits."""
    return round(value, 2 - math.floor(math.log10(value))) if value else 0.0
