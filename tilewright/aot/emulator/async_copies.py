"""``cp.async``: copies from global to shared memory that land when the issuing thread waits for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tilewright.aot.emulator.addresses import active, address_of
from tilewright.aot.emulator.errors import PTXError, Unsupported
from tilewright.aot.emulator.numerics import U32, U64, Array
from tilewright.aot.emulator.program import Instruction
from tilewright.aot.emulator.registry import Mask, Run, allow, literal
from tilewright.aot.emulator.views import check_alignment

if TYPE_CHECKING:
    from tilewright.aot.emulator.machine import Machine

_HINTS = ("async", "shared", "shared::cta", "global", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B")


@dataclass
class _Flight:
    """One copy under way: for each thread its group, the place, the data and the warp."""

    threads: Array
    group: Array
    flat: Array
    data: Array
    warp: Array

    def part(self, chosen: Array) -> _Flight:
        """Only some of the threads."""
        return _Flight(
            self.threads[chosen], self.group[chosen], self.flat[chosen], self.data[chosen], self.warp[chosen]
        )


class AsyncCopies:
    """``cp.async`` in flight in a batch of CTAs."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.committed = np.zeros(machine.lanes, np.int64)  # groups committed so far by each thread
        self.flying: list[_Flight] = []

    def issue(self, target: Array, data: Array, mask: Mask) -> None:
        """Start a copy of ``data`` [threads, size] to shared addresses."""
        machine = self.machine
        threads = machine.threads_of(mask)
        flat, warp = machine.shared_offsets(target, data.shape[1], mask, "write")
        machine.shared.begin_copy(flat, data.shape[1], warp)
        self.flying.append(_Flight(threads, self.committed[threads].copy(), flat, data, warp))

    def commit(self, mask: Mask) -> None:
        """Close the current group of the threads in ``mask``."""
        self.committed[... if mask is None else mask] += 1

    def wait(self, pending: int | None, mask: Mask) -> None:
        """Land what the threads in ``mask`` committed, but for their ``pending`` latest groups (None: land all)."""
        kept = []
        for flight in self.flying:
            ready = np.ones(len(flight.threads), bool)
            if pending is not None:
                ready = flight.group < self.committed[flight.threads] - pending
            if mask is not None:
                ready &= mask[flight.threads]
            if ready.any():
                landing = flight if ready.all() else flight.part(ready)
                self.machine.shared.land(landing.flat, landing.data, landing.warp)
            if not ready.all():
                kept.append(flight.part(~ready))
        self.flying = kept


def build_async_copy(instruction: Instruction, machine: Machine) -> Run:
    """Builder of ``cp.async`` and of its commits and waits."""
    what = instruction.parts[2]
    if what == "commit_group":
        return lambda mask: machine.copies.commit(mask)
    if what == "wait_all":
        return lambda mask: machine.copies.wait(None, mask)
    if what == "wait_group":
        pending = literal(instruction.operands[0])
        return lambda mask: machine.copies.wait(pending, mask)
    if what not in ("ca", "cg"):
        raise Unsupported(instruction.opcode)
    allow(instruction, what, *_HINTS)
    if instruction.kind not in (*_HINTS, what):
        raise Unsupported(instruction.opcode)
    target = address_of(machine, instruction.operands[0])
    origin = address_of(machine, instruction.operands[1], 64)
    size = literal(instruction.operands[2])
    if size not in (4, 8, 16) or (what == "cg" and size != 16):
        raise Unsupported(f"{instruction.opcode} of {size} bytes")
    rest = instruction.operands[3:]
    if "L2::cache_hint" in instruction.parts:
        rest = rest[:-1]
    values = machine.values
    ignore = machine.predicate(rest[0]) if rest and machine.width(rest[0]) == "pred" else None
    count = machine.source(rest[0], 32) if rest and ignore is None else None
    reads = machine.stats.site(instruction, "global", "read")
    writes = machine.stats.site(instruction, "shared", "written")

    def amounts(lanes: int) -> Array | None:
        """Bytes that each thread reads, where an operand says so."""
        if ignore is not None:
            return np.where(ignore(), U32(0), U32(size))
        return None if count is None else values[count]

    def run(mask: Mask) -> None:
        machine.effective = mask
        to, source = active(target(), mask), active(origin(), mask)
        required = amounts(machine.lanes)
        taken = None if required is None else active(required, mask)
        if taken is None or (taken == size).all():
            data = machine.memory.load(source, size, machine.cta_numbers(mask))
            reads.count(machine, source, size, mask)
        else:  # the rest of a short copy is filled with zeros
            data = short_copy(source, taken, mask)
        machine.copies.issue(to, data, mask)
        writes.count(machine, to, size, mask)

    def short_copy(source: Array, taken: Array, mask: Mask) -> Array:
        data = np.zeros((len(source), size), np.uint8)
        if (taken > size).any():
            lane = int(np.argmax(taken > size))
            raise PTXError(f"cp.async source size {int(taken[lane])} exceeds the copy size {size}", lane)
        threads, ctas = machine.threads_of(mask), machine.cta_numbers(mask)
        for amount in (int(a) for a in np.unique(taken) if a):
            lanes = np.flatnonzero(taken == amount)
            machine.effective = threads[lanes]
            check_alignment(source[lanes], size, "global")
            step = int(np.gcd(amount, size))
            for piece in range(0, amount, step):
                owners = None if ctas is None else ctas[lanes]
                data[lanes, piece : piece + step] = machine.memory.load(source[lanes] + U64(piece), step, owners)
            chosen = np.zeros(machine.lanes, bool)
            chosen[threads[lanes]] = True
            reads.count(machine, source[lanes], amount, chosen)
        machine.effective = mask
        return data

    return run
