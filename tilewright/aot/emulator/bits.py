"""Bitwise logic, shifts, byte permutations and bit fields."""

from __future__ import annotations

import numpy as np

from tilewright.aot.emulator.machine import Machine
from tilewright.aot.emulator.numerics import U8, U32, U64, WORD, Array, bits_of, low_integer
from tilewright.aot.emulator.program import Instruction, Width
from tilewright.aot.emulator.registry import Run, allow, bitwise, builds, compute, literal, one_of

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@builds(*LOGIC)
def _logic(instruction: Instruction, machine: Machine) -> Run:
    allow(instruction)
    width: Width = "pred" if instruction.kind == "pred" else bits_of(instruction.kind)
    return bitwise(instruction, machine, LOGIC[instruction.parts[0]], width)


@builds("shl", "shr")
def _shift(instruction: Instruction, machine: Machine) -> Run:
    """Amounts beyond the width are clamped to it."""
    allow(instruction)
    kind, left = instruction.kind, instruction.parts[0] == "shl"
    bits = bits_of(kind)
    word, top = WORD[bits], U32(bits - 1)

    def function(a: Array, amount: Array) -> Array:
        inside = np.minimum(amount, top)
        if kind[0] == "s" and not left:
            signed = a.view(a.dtype.name.removeprefix("u"))
            return (signed >> inside.astype(signed.dtype)).view(word)
        shifted = a << inside.astype(word) if left else a >> inside.astype(word)
        return np.where(amount > top, word(0), shifted)

    return bitwise(instruction, machine, function, bits, 32)


@builds("shf")
def _funnel(instruction: Instruction, machine: Machine) -> Run:
    allow(instruction, "l", "r", "wrap", "clamp")
    left, wrap = "l" in instruction.parts, "wrap" in instruction.parts

    def function(low: Array, high: Array, amount: Array) -> Array:
        wide = high.astype(U64) << U64(32) | low.astype(U64)
        amount = (amount & U32(31) if wrap else np.minimum(amount, U32(32))).astype(U64)
        return ((wide << amount) >> U64(32) if left else wide >> amount).astype(U32)

    return bitwise(instruction, machine, function, 32)


@builds("lop3")
def _lop3(instruction: Instruction, machine: Machine) -> Run:
    """Any function of three bits: bit 4 a + 2 b + c of the table."""
    allow(instruction)
    table = literal(instruction.operands[4])

    def function(a: Array, b: Array, c: Array) -> Array:
        out = np.zeros_like(a)
        for row in range(8):
            if table >> row & 1:
                out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return out

    sources = [machine.source(op, 32) for op in instruction.operands[1:4]]
    return compute(machine, machine.target(instruction.operands[0]), function, sources)


#: Selectors of the modes of prmt for each value of the last operand (PTX ISA, "prmt").
_PERMUTATIONS = {
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}


@builds("prmt")
def _prmt(instruction: Instruction, machine: Machine) -> Run:
    mode = one_of(instruction, _PERMUTATIONS)
    if set(instruction.parts[1:]) - {"b32", mode}:
        allow(instruction)

    def function(a: Array, b: Array, selector: Array) -> Array:
        if mode:
            selector = np.array(_PERMUTATIONS[mode], U32)[selector & U32(3)]
        pool = np.concatenate([a.view(U8).reshape(-1, 4), b.view(U8).reshape(-1, 4)], axis=1)
        nibble = (selector[:, None] >> np.array([0, 4, 8, 12], U32)) & U32(15)
        byte = np.take_along_axis(pool, (nibble & U32(7)).astype(np.int64), axis=1)
        sign = np.where(byte & 0x80, U8(255), U8(0))
        return np.where(nibble & U32(8), sign, byte).view(U32).reshape(-1)

    return bitwise(instruction, machine, function, 32)


@builds("bfe")
def _extract(instruction: Instruction, machine: Machine) -> Run:
    """Bit field; a signed one is extended from its top bit, or the register's where the field reaches beyond."""
    allow(instruction)
    kind = instruction.kind
    bits = bits_of(kind)
    word, signed = WORD[bits], kind[0] == "s"

    def function(a: Array, position: Array, length: Array) -> Array:
        position, length = (position & U32(255)).astype(np.int64), (length & U32(255)).astype(np.int64)
        wide = low_integer(a, kind)
        shifted = wide >> np.minimum(position, 63).astype(wide.dtype)
        spare = np.clip(64 - length, 0, 63).astype(wide.dtype)
        field = (shifted << spare) >> spare
        if signed:
            field = np.where(position + length > bits, shifted, field)
        else:
            field = np.where(position >= bits, U64(0), field)
        return np.where(length == 0, field.dtype.type(0), field).astype(word)

    return bitwise(instruction, machine, function, bits, 32, 32)


@builds("bfi")
def _insert(instruction: Instruction, machine: Machine) -> Run:
    allow(instruction)
    bits = bits_of(instruction.kind)
    word = WORD[bits]

    def function(a: Array, b: Array, position: Array, length: Array) -> Array:
        position, length = (position & U32(255)).astype(U64), (length & U32(255)).astype(U64)
        ones = np.where(length >= U64(64), ~U64(0), (U64(1) << np.minimum(length, U64(63))) - U64(1))
        at = np.minimum(position, U64(63))
        field = np.where(position > U64(63), U64(0), ones << at)
        return (b.astype(U64) & ~field | (a.astype(U64) << at) & field).astype(word)

    return bitwise(instruction, machine, function, bits, bits, 32, 32)


@builds("popc", "clz", "brev")
def _whole_word(instruction: Instruction, machine: Machine) -> Run:
    allow(instruction)
    bits = bits_of(instruction.kind)

    def every_bit(a: Array) -> Array:
        """[threads, bits], low bit first."""
        return np.unpackbits(a.view(U8).reshape(-1, bits // 8), axis=1, bitorder="little")

    def reverse(a: Array) -> Array:
        turned = np.packbits(every_bit(a)[:, ::-1], axis=1, bitorder="little")
        return turned.view(WORD[bits]).reshape(-1)

    function = {
        "popc": lambda a: every_bit(a).sum(axis=1, dtype=U32),
        "clz": lambda a: np.where(a == 0, bits, every_bit(a)[:, ::-1].argmax(axis=1)).astype(U32),
        "brev": reverse,
    }[instruction.parts[0]]
    return bitwise(instruction, machine, function, bits)
