"""Atomic operations on global and shared memory.

Lanes that meet at one address take turns in the order of their numbers: any order is allowed, this one is reproducible.
"""

from __future__ import annotations

import numpy as np

from tilewright.aot.emulator.addresses import HINTS, active, address_of, space_of, vector_of
from tilewright.aot.emulator.errors import Unsupported
from tilewright.aot.emulator.machine import Machine
from tilewright.aot.emulator.numerics import U64, WORD, Array, bits_of, decode, encode
from tilewright.aot.emulator.program import Instruction
from tilewright.aot.emulator.registry import Function, Mask, Run, builds, elements, one_of, slot_of


def _exchange_if_equal(old: Array, expected: Array, new: Array) -> Array:
    return np.where(old == expected, new, old)


_ON_NUMBERS: dict[str, Function] = {"add": np.add, "min": np.minimum, "max": np.maximum}
_ON_WORDS: dict[str, Function] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "cas": _exchange_if_equal,
}


def turns(address: Array) -> Array:
    """For each lane, how many lanes before it have the same address."""
    order = np.argsort(address, kind="stable")
    ordered = address[order]
    position = np.arange(len(address))
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    start = np.maximum.accumulate(np.where(first, position, 0))
    count = np.empty(len(address), np.int64)
    count[order] = position - start
    return count


@builds("atom", "red")
def _atomic(instruction: Instruction, machine: Machine) -> Run:
    space = space_of(instruction)
    if space not in ("global", "shared"):
        raise Unsupported(f"{instruction.opcode}: {space} address space")
    returns = instruction.parts[0] == "atom"
    operation = one_of(instruction, (*_ON_NUMBERS, *_ON_WORDS))
    unknown = set(instruction.parts[1:-1]) - HINTS - {operation}
    if not operation or unknown:
        raise Unsupported(f"{instruction.opcode}: {', '.join(sorted(unknown)) or 'operation'}")
    count, kind = vector_of(instruction), instruction.kind
    bits = bits_of(kind)
    size = bits // 8 * count
    operands = instruction.operands[1:] if returns else instruction.operands
    place = address_of(machine, operands[0], 64 if space == "global" else None)
    taken = 3 if operation == "cas" else 2  # beyond those, a cache policy
    inputs = [[machine.source(item, bits) for item in elements(op)] for op in operands[1:taken]]
    items = elements(instruction.operands[0]) if returns else []
    outputs = [slot_of(machine, item) for item in items]
    values, word = machine.values, WORD[bits]
    site = machine.stats.site(instruction, space, "written")

    def apply(old: Array, *given: Array) -> Array:
        """New words [lanes, count] from old ones and the operands."""
        if operation in _ON_WORDS:
            return _ON_WORDS[operation](old, *given)
        numbers = [decode(np.ascontiguousarray(x).reshape(-1), kind) for x in (old, given[0])]
        return encode(_ON_NUMBERS[operation](*numbers), kind).reshape(old.shape)

    def access(address: Array, threads: Array, given: list[Array]) -> Array:
        """Read, modify and write at distinct addresses; the words before."""
        if space == "global":
            old = machine.memory.load(address, size).view(word).reshape(-1, count)
            machine.memory.store(address, np.ascontiguousarray(apply(old, *given)).view(np.uint8).reshape(-1, size))
            return old
        flat = machine.shared.flat(machine.cta_of[threads], address, size, "atomic")
        warp = machine.warp_of[threads]
        old = machine.shared.load_atomic(flat, size, warp).view(word).reshape(-1, count)
        new = np.ascontiguousarray(apply(old, *given)).view(np.uint8).reshape(-1, size)
        machine.shared.store_atomic(flat, new, warp)
        return old

    def run(mask: Mask) -> None:
        threads = machine.threads_of(mask)
        address = active(place(), mask)
        given = [np.stack([active(values[slot], mask) for slot in group], axis=1) for group in inputs]
        # Addresses of shared memory mean another place in each CTA.
        where = address.astype(U64)
        if space == "shared":
            where = where | machine.cta_of[threads].astype(U64) << U64(32)
        turn = turns(where)
        before = np.empty((len(address), count), word)
        for number in range(int(turn.max(initial=-1)) + 1):
            lanes = np.flatnonzero(turn == number)
            machine.effective = threads[lanes]
            before[lanes] = access(address[lanes], threads[lanes], [x[lanes] for x in given])
        site.count(machine, address, size, mask)
        for i, slot in enumerate(outputs):
            machine.write_lanes(slot, before[:, i], mask)

    return run
