"""Moves between registers, and addresses taken from one space to another."""

from __future__ import annotations

import numpy as np

from tilewright.aot.emulator.errors import Unsupported
from tilewright.aot.emulator.machine import Machine
from tilewright.aot.emulator.numerics import U8, WORD, Array, bits_of
from tilewright.aot.emulator.program import Instruction, Operand, Vector, Width
from tilewright.aot.emulator.registry import Mask, Run, bitwise, builds, compute, slot_of


@builds("mov")
def _mov(instruction: Instruction, machine: Machine) -> Run:
    kind = instruction.kind
    width: Width = "pred" if kind == "pred" else bits_of(kind)
    target, source = instruction.operands
    if isinstance(target, Vector) and isinstance(width, int):
        return _unpack(machine, list(target.items), source, width)
    if isinstance(source, Vector) and isinstance(width, int):
        return _pack(machine, target, list(source.items), width)
    return compute(machine, machine.target(target), lambda a: a, [machine.source(source, width)])


def _part(width: int, count: int) -> int:
    """Bits of each of ``count`` registers that make up one of ``width`` bits."""
    part = width // count
    if part not in (8, 16, 32) or part * count != width:
        raise Unsupported(f"{count} registers that make up {width} bits")
    return part


def _unpack(machine: Machine, items: list[Operand], source: Operand, width: int) -> Run:
    part = _part(width, len(items))
    register = WORD[max(part, 16)]  # an 8-bit register is held in 16 bits
    slots = [slot_of(machine, item) for item in items]
    origin, values = machine.source(source, width), machine.values

    def run(mask: Mask) -> None:
        pieces = values[origin].view(WORD[part]).reshape(-1, len(slots))
        for i, slot in enumerate(slots):
            machine.write(slot, np.ascontiguousarray(pieces[:, i], register), mask)

    return run


def _pack(machine: Machine, target: Operand, items: list[Operand], width: int) -> Run:
    part = _part(width, len(items))
    word, piece = WORD[width], WORD[part]
    sources = [machine.source(item, max(part, 16)) for item in items]

    def function(*pieces: Array) -> Array:
        if piece is U8:
            pieces = tuple(p.astype(U8) for p in pieces)
        return np.stack(pieces, axis=1).view(word).reshape(-1)

    return compute(machine, machine.target(target), function, sources)


@builds("cvta")
def _cvta(instruction: Instruction, machine: Machine) -> Run:
    """Global addresses are generic addresses; those of shared memory have no generic form here."""
    if "global" not in instruction.parts:
        raise Unsupported(f"{instruction.opcode}: generic addresses of other than global memory")
    return bitwise(instruction, machine, lambda a: a, 64)


@builds("isspacep")
def _isspacep(instruction: Instruction, machine: Machine) -> Run:
    answer = instruction.parts[1] == "global"
    return bitwise(instruction, machine, lambda a: np.full(a.shape, answer), 64)
