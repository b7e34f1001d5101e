"""Loads, stores and atomic operations.

Lanes of an atomic that meet at one address take turns in the order of their numbers: any order is allowed, this one is
reproducible.
"""

from __future__ import annotations

import numpy as np

from tilewright.aot.emulator.addresses import HINTS, active, address_of, space_of, vector_of
from tilewright.aot.emulator.errors import Unsupported
from tilewright.aot.emulator.machine import Machine
from tilewright.aot.emulator.numerics import U64, WORD, Array, bits_of, decode, encode
from tilewright.aot.emulator.program import SINK, Address, Instruction, Operand, Register, Symbol
from tilewright.aot.emulator.registry import Function, Mask, Run, allow, builds, elements, one_of, slot_of


def _moved(instruction: Instruction, space: str, registers: Operand) -> tuple[list[Operand], str, int]:
    """(registers, type, bytes of one) that a load or store moves."""
    if space not in ("global", "shared", "local"):
        raise Unsupported(f"{instruction.opcode}: {space} address space")
    allow(instruction, *HINTS)
    items, count, size = elements(registers), vector_of(instruction), bits_of(instruction.kind) // 8
    if size * count > 16:
        raise Unsupported(f"{instruction.opcode}: more than 16 bytes a thread")
    if len(items) != count:
        raise Unsupported(f"{instruction.opcode}: {len(items)} registers for {count} elements")
    return items, instruction.kind, size


@builds("ld", "ldu")
def _load(instruction: Instruction, machine: Machine) -> Run:
    space = space_of(instruction)
    if space == "param":
        return _load_parameter(instruction, machine)
    items, kind, size = _moved(instruction, space, instruction.operands[0])
    count = len(items)
    slots = [(i, machine.target(item), machine.width(item)) for i, item in enumerate(items) if item != SINK]
    total = size * count
    place = address_of(machine, instruction.operands[1], 64 if space == "global" else None)
    element = WORD[size * 8]
    signed_element = f"int{size * 8}" if kind[0] == "s" else None
    site = machine.stats.site(instruction, space, "read") if space != "local" else None

    def fetch(address: Array, mask: Mask) -> Array:
        if space == "local":
            return machine.local.load(machine.threads_of(mask), address, total)
        if space == "global":
            data = machine.memory.load(address, total, machine.cta_numbers(mask))
        else:
            offset, warp = machine.shared_offsets(address, total, mask, "read")
            data = machine.shared.load(offset, total, warp)
        if site:
            site.count(machine, address, total, mask)
        return data

    def run(mask: Mask) -> None:
        machine.effective = mask
        data = fetch(active(place(), mask), mask).view(element).reshape(-1, count)
        for i, slot, width in slots:
            value = data[:, i]
            if size * 8 != width and width is not None:
                value = (value.view(signed_element) if signed_element else value).astype(WORD[width])
            machine.write_lanes(slot, value, mask)

    return run


def _load_parameter(instruction: Instruction, machine: Machine) -> Run:
    destination, where = instruction.operands
    if not isinstance(destination, Register) or not isinstance(where, Address) or where.offset:
        raise Unsupported(instruction.opcode)
    slot, width = machine.target(destination), machine.width(destination)
    if not isinstance(where.base, Symbol) or not isinstance(width, int) or bits_of(instruction.kind) > width:
        raise Unsupported(instruction.opcode)
    values, source = machine.values, machine.parameter(where.base.name, width)
    return lambda mask: machine.write(slot, values[source], mask)


@builds("st")
def _store(instruction: Instruction, machine: Machine) -> Run:
    space = space_of(instruction)
    items, _, size = _moved(instruction, space, instruction.operands[1])
    slots = [machine.source(item, machine.width(item) or max(size * 8, 16)) for item in items]
    element = WORD[size * 8]
    place = address_of(machine, instruction.operands[0], 64 if space == "global" else None)
    values = machine.values
    site = machine.stats.site(instruction, space, "written") if space != "local" else None

    def run(mask: Mask) -> None:
        machine.effective = mask
        address = active(place(), mask)
        columns = [active(values[slot], mask).astype(element, copy=False) for slot in slots]
        data = np.stack(columns, axis=1).view(np.uint8)
        if space == "local":
            machine.local.store(machine.threads_of(mask), address, data)
        elif space == "global":
            machine.memory.store(address, data, machine.cta_numbers(mask))
        else:
            offset, warp = machine.shared_offsets(address, data.shape[1], mask, "write")
            machine.shared.store(offset, data, warp)
        if site:
            site.count(machine, address, data.shape[1], mask)

    return run


@builds("prefetch", "prefetchu", "discard", "applypriority", "createpolicy")
def _hint(instruction: Instruction, machine: Machine) -> Run:
    """Hints to the caches change no result; a policy is a number that is never read."""
    if instruction.parts[0] == "createpolicy":
        slot, values = machine.target(instruction.operands[0]), machine.values
        return lambda mask: machine.write(slot, np.zeros_like(values[slot]), mask)
    return lambda mask: None


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
        """New bytes [lanes, size] from old words [lanes, count] and the operands."""
        if operation in _ON_WORDS:
            new = _ON_WORDS[operation](old, *given)
        else:
            numbers = [decode(np.ascontiguousarray(x).reshape(-1), kind) for x in (old, given[0])]
            new = encode(_ON_NUMBERS[operation](*numbers), kind)
        return np.ascontiguousarray(new).view(np.uint8).reshape(-1, size)

    def access(address: Array, threads: Array, given: list[Array]) -> Array:
        """Read, modify and write at distinct addresses; the words before."""
        if space == "global":
            old = machine.memory.load(address, size).view(word).reshape(-1, count)
            machine.memory.store(address, apply(old, *given))
            return old
        flat = machine.shared.flat(machine.cta_of[threads], address, size, "atomic")
        warp = machine.warp_of[threads]
        old = machine.shared.load_atomic(flat, size, warp).view(word).reshape(-1, count)
        machine.shared.store_atomic(flat, apply(old, *given), warp)
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
