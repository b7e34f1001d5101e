"""What a run counted."""

# mypy: ignore-errors
# ruff: noqa: D102, D103, E501, B007
from __future__ import annotations

from collections import Counter

import numpy as np


def _distinct(rows: np.ndarray) -> int:
    """Sum over rows of the number of distinct non-negative values."""
    ordered = np.sort(rows, axis=1)
    fresh = ordered >= 0
    fresh[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return int(fresh.sum())


class Stats:
    """Dynamic counts of one launch.

    opcodes: warp-level executions by opcode (guarded-off ones included). global_bytes, sectors: {"read", "written"}, bytes asked
    for by active threads and 32-byte sectors touched by warp accesses. accesses: warp-level global accesses. wavefronts and
    phases: shared-memory cycles taken, and taken without bank conflicts. mma: tensor-core instructions (per warp, or per
    warp group for wgmma) and their operations ``mma_flops``.
    """

    def __init__(self, profile=True):
        self.profile = profile
        self.opcodes = Counter()
        self.global_bytes = Counter()
        self.sectors = Counter()
        self.accesses = Counter()
        self.wavefronts = Counter()
        self.phases = Counter()
        self.mma = self.mma_flops = 0
        self.races, self.warnings = [], set()
        self.ctas, self.seconds = 0, 0.0

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    @property
    def bank_conflicts(self) -> int:
        """Extra shared-memory wavefronts."""
        return sum(self.wavefronts.values()) - sum(self.phases.values())

    def sectors_per_byte(self, direction="read") -> float:
        """32 * sectors / bytes: 1.0 is perfectly coalesced."""
        return 32 * self.sectors[direction] / max(self.global_bytes[direction], 1)

    def finish(self, blocks, ctas):
        self.ctas = ctas
        for block in blocks:
            for opcode, count in block.opcodes.items():
                if block.runs:
                    self.opcodes[opcode] += count * block.runs

    def _by_warp(self, machine, lanes, mask):
        values = lanes.astype(np.int64)
        if mask is not None:
            full = np.full(machine.lanes, -1, np.int64)
            full[mask] = values
            values = full
        return values.reshape(-1, 32)

    def note_global(self, machine, lanes, size, mask, direction):
        self.global_bytes[direction] += size * len(lanes)
        if self.profile:
            grid = self._by_warp(machine, lanes, mask)
            self.sectors[direction] += _distinct(grid >> 5)
            self.accesses[direction] += int((grid >= 0).any(1).sum())

    def note_shared(self, machine, lanes, size, mask, direction):
        if self.profile:
            at_once = min(32, 128 // size)
            self.note_phases(self._by_warp(machine, lanes, mask).reshape(-1, at_once), size, direction)

    def note_phases(self, rows, size, direction):
        """``rows`` [phases, lanes] of byte addresses served together (-1: inactive): count the cycles by bank."""
        if not self.profile:
            return
        rows = rows.astype(np.int64)
        rows = rows[(rows >= 0).any(1)]
        if not len(rows):
            return
        word = np.where(rows < 0, -1, rows >> 2)[:, :, None] + np.arange(max(size // 4, 1))
        word = np.where(rows[:, :, None] < 0, -1, word).reshape(len(rows), -1)
        word = np.sort(word, axis=1)
        fresh = word >= 0
        fresh[:, 1:] &= word[:, 1:] != word[:, :-1]
        key = np.arange(len(rows))[:, None] * 32 + (word & 31)
        hits = np.bincount(key[fresh], minlength=len(rows) * 32).reshape(-1, 32)
        self.wavefronts[direction] += int(hits.max(1).sum())
        self.phases[direction] += len(rows)

    def __str__(self):
        return (
            f"{self.ctas} CTAs, {self.instructions} warp instructions in {self.seconds:.3f} s, {self.mma} mma, "
            f"global {dict(self.global_bytes)} bytes in {dict(self.sectors)} sectors, "
            f"{self.bank_conflicts} bank conflicts in {sum(self.phases.values())} shared phases"
        )
