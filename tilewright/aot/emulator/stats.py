"""What a run counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tilewright.aot.emulator.numerics import Array
from tilewright.aot.emulator.program import Instruction
from tilewright.aot.emulator.registry import Mask

if TYPE_CHECKING:
    from tilewright.aot.emulator.control import Block
    from tilewright.aot.emulator.machine import Machine


def _ordered(grid: Array) -> tuple[Array, Array]:
    """Each row sorted, and where in it a non-negative value comes for the first time."""
    ordered = np.sort(grid, axis=1)
    fresh = ordered >= 0
    fresh[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return ordered, fresh


@dataclass
class Site:
    """What one instruction of the kernel did to memory.

    opcode, line, source: the instruction, its line in the PTX text and, where known, "file.py:12". space: "global" or
    "shared". direction: "read" or "written". accesses: executions by a warp with at least one active thread (a bulk
    copy counts once). bytes: asked for by active threads. Global memory: sectors, of 32 bytes, that the accesses
    touched; ideal_sectors: the fewest that hold the distinct bytes of each access. Shared memory: wavefronts taken,
    with conflicts between the 32 banks of 4 bytes, and ideal_wavefronts without. What ``wgmma`` and bulk copies do in
    shared memory takes no wavefronts here.
    """

    opcode: str
    line: int
    source: str
    space: str
    direction: str
    accesses: int = 0
    bytes: int = 0
    sectors: int = 0
    ideal_sectors: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0
    profile: bool = True

    def count(self, machine: Machine, lanes: Array, size: int, mask: Mask) -> None:
        """Count accesses of ``size`` bytes at addresses ``lanes`` of the active threads."""
        self.bytes += size * len(lanes)
        if not self.profile:
            return
        grid = _by_warp(machine, lanes, mask)
        if self.space == "global":
            self.count_rows(grid, size)
        else:
            self.accesses += int((grid >= 0).any(axis=1).sum())
            self.count_phases(grid.reshape(-1, min(32, 128 // size)), size)

    def count_rows(self, grid: Array, size: int) -> None:
        """Count the sectors of accesses, one in each row of byte addresses (negative: inactive)."""
        self.accesses += int((grid >= 0).any(axis=1).sum())
        self.sectors += int(_ordered(grid >> 5)[1].sum())
        distinct = _ordered(grid >> (size.bit_length() - 1))[1].sum(axis=1) * size
        self.ideal_sectors += int((-(-distinct // 32)).sum())

    def count_phases(self, grid: Array, size: int) -> None:
        """Count wavefronts; a row of ``grid`` holds the byte addresses that could be served together."""
        if not self.profile:
            return
        grid = grid.astype(np.int64)
        grid = grid[(grid >= 0).any(axis=1)]
        if not len(grid):
            return
        # An aligned access of 4, 8 or 16 bytes covers whole banks: count by units of that many bytes.
        unit = max(size, 4)
        count = 128 // unit
        place, fresh = _ordered(grid >> (unit.bit_length() - 1))  # inactive threads stay negative
        key = np.arange(len(grid))[:, None] * count + place % count
        hits = np.bincount(key[fresh], minlength=len(grid) * count).reshape(-1, count)
        self.wavefronts += int(hits.max(axis=1).sum())
        self.ideal_wavefronts += len(grid)


def _by_warp(machine: Machine, lanes: Array, mask: Mask) -> Array:
    full = np.full(machine.lanes, -1, np.int64)
    full[... if mask is None else mask] = lanes
    return full.reshape(-1, 32)


@dataclass
class Stats:
    """Dynamic counts of one launch.

    opcodes: executions by a warp, by opcode; those whose guard was false everywhere count too, as on a GPU they issue.
    matrix: executions of matrix instructions by kind, "mma.sync" and "mma.sp" by a warp, "wgmma" by a warp group of
    four. matrix_flops: their multiplications and additions, on a sparse operand as if it were dense. sites: what each
    instruction did to memory. global_bytes to ideal_wavefronts: their sums, see ``Site``, by direction; accesses are
    those to global memory. ctas: how many ran. seconds: that emulation took, which says nothing about a GPU. races:
    what ``races="report"`` found. warnings: asynchronous work left over at the end.
    Sectors and wavefronts stay 0 with ``profile=False``.
    """

    profile: bool = True
    opcodes: Counter[str] = field(default_factory=Counter)
    matrix: Counter[str] = field(default_factory=Counter)
    matrix_flops: int = 0
    sites: list[Site] = field(default_factory=list)
    global_bytes: Counter[str] = field(default_factory=Counter)
    accesses: Counter[str] = field(default_factory=Counter)
    sectors: Counter[str] = field(default_factory=Counter)
    ideal_sectors: Counter[str] = field(default_factory=Counter)
    shared_bytes: Counter[str] = field(default_factory=Counter)
    wavefronts: Counter[str] = field(default_factory=Counter)
    ideal_wavefronts: Counter[str] = field(default_factory=Counter)
    races: list[str] = field(default_factory=list)
    warnings: set[str] = field(default_factory=set)
    ctas: int = 0
    seconds: float = 0.0

    def site(self, instruction: Instruction, space: str, direction: str) -> Site:
        """A new counter for one instruction."""
        place = instruction.opcode, instruction.line, instruction.source
        self.sites.append(Site(*place, space, direction, profile=self.profile))
        return self.sites[-1]

    @property
    def instructions(self) -> int:
        """Executions by a warp of any instruction."""
        return sum(self.opcodes.values())

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts of shared memory beyond the ideal."""
        return sum(self.wavefronts.values()) - sum(self.ideal_wavefronts.values())

    @property
    def wavefronts_over_ideal(self) -> float:
        """Wavefronts of shared memory by the ideal number; 1.0 without conflicts, and without accesses."""
        ideal = sum(self.ideal_wavefronts.values())
        return sum(self.wavefronts.values()) / ideal if ideal else 1.0

    def sectors_per_byte(self, direction: str = "read") -> float:
        """32 * sectors / bytes asked for: 1.0 is perfectly coalesced, less means that threads shared bytes."""
        return 32 * self.sectors[direction] / max(self.global_bytes[direction], 1)

    def sectors_over_ideal(self, direction: str = "read") -> float:
        """Sectors by the ideal number; 1.0 is perfectly coalesced, and no access at all."""
        ideal = self.ideal_sectors[direction]
        return self.sectors[direction] / ideal if ideal else 1.0

    @property
    def matrix_instructions(self) -> int:
        """Matrix instructions of any kind, each in its unit: a warp or a warp group."""
        return sum(self.matrix.values())

    @property
    def instructions_per_matrix_instruction(self) -> float:
        """Instructions of any kind executed by a warp for each of its matrix instructions; infinite without any.

        A ``wgmma`` counts as one instruction of each of its four warps.
        """
        by_warp = sum(count * (4 if kind == "wgmma" else 1) for kind, count in self.matrix.items())
        return self.instructions / by_warp if by_warp else float("inf")

    def finish(self, blocks: Iterable[Block], ctas: int) -> None:
        """Add up the instructions of the blocks that ran, and what the sites counted."""
        self.ctas = ctas
        for block in blocks:
            for opcode, count in block.opcodes.items():
                if block.runs:
                    self.opcodes[opcode] += count * block.runs
        for site in self.sites:
            at = site.direction
            if site.space == "global":
                self.global_bytes[at] += site.bytes
                self.accesses[at] += site.accesses
                self.sectors[at] += site.sectors
                self.ideal_sectors[at] += site.ideal_sectors
            else:
                self.shared_bytes[at] += site.bytes
                self.wavefronts[at] += site.wavefronts
                self.ideal_wavefronts[at] += site.ideal_wavefronts

    def __str__(self) -> str:
        return (
            f"{self.ctas} CTAs, {self.instructions} warp instructions in {self.seconds:.3f} s, {dict(self.matrix)} "
            f"matrix instructions, global {dict(self.global_bytes)} bytes in {dict(self.sectors)} sectors, "
            f"{self.bank_conflicts} bank conflicts in {sum(self.wavefronts.values())} shared wavefronts"
        )
