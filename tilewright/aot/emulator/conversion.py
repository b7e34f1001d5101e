"""``cvt``: conversions between number formats."""

from __future__ import annotations

import numpy as np

from tilewright.aot.emulator.errors import Unsupported
from tilewright.aot.emulator.machine import Machine
from tilewright.aot.emulator.numerics import (
    FLOAT8_PAIRS,
    FLOATS,
    LARGEST,
    U32,
    U64,
    WORD,
    Array,
    bits_of,
    decode,
    encode,
    flush,
    limits,
    low_integer,
    to_integer,
    to_tf32,
    to_whole,
)
from tilewright.aot.emulator.program import Instruction
from tilewright.aot.emulator.registry import ROUNDINGS, Function, Run, allow, bitwise, builds, compute, one_of

_WHOLE = ("rni", "rzi", "rmi", "rpi")
_MODIFIERS = (*ROUNDINGS, *_WHOLE, "rna", "ftz", "sat", "relu", "satfinite")


@builds("cvt")
def _cvt(instruction: Instruction, machine: Machine) -> Run:
    if "pack" in instruction.parts:
        return _pack_integers(instruction, machine)
    source, target = instruction.parts[-1], instruction.parts[-2]
    allow(instruction, *_MODIFIERS, target)
    slot, width = machine.target(instruction.operands[0]), machine.width(instruction.operands[0])
    known = FLOATS | set(FLOAT8_PAIRS)
    for kind in (source, target):
        if kind not in known:
            limits(kind)  # refuses what is no integer type either
    if len(instruction.operands) == 3:
        return _pack_floats(instruction, machine, source, target)
    if len(instruction.operands) != 2 or not isinstance(width, int):
        raise Unsupported(instruction.opcode)
    operand = instruction.operands[1]
    origin = machine.source(operand, machine.width(operand) or max(bits_of(source), 16))
    if source in known:
        if target in known:
            function = _float_to_float(instruction, source, target)
        else:
            function = _float_to_integer(instruction, source, target, width)
        held, narrowed = WORD[bits_of(source)], function

        def function(a: Array) -> Array:
            return narrowed(a.astype(held, copy=False))  # the register may be wider than the type

    elif target in known:
        function = _integer_to_float(instruction, source, target)
    else:
        function = _integer_to_integer(instruction, source, target, width)
    word = WORD[width]
    return compute(machine, slot, lambda a: function(a).astype(word, copy=False), [origin])


def _pack_integers(instruction: Instruction, machine: Machine) -> Run:
    """``cvt.pack.sat.type.s32[.b32] d, a, b[, c]``: a and b saturated side by side, b lowest, above them c's low
    bits.
    """
    allow(instruction, "pack", "sat", "u8", "s8", "u16", "s16", "s32")
    kind = instruction.parts[3]
    low, high = limits(kind)
    bits, count = bits_of(kind), len(instruction.operands)
    if instruction.parts[4] != "s32" or count != (4 if bits == 8 else 3):
        raise Unsupported(instruction.opcode)

    def function(a: Array, b: Array, *c: Array) -> Array:
        upper, lower = (np.clip(x.view(np.int32).astype(np.int64), low, high) & ((1 << bits) - 1) for x in (a, b))
        word = upper.astype(U32) << U32(bits) | lower.astype(U32)
        return word | c[0] << U32(2 * bits) if c else word

    return bitwise(instruction, machine, function, 32)


def _clamped(instruction: Instruction, value: Array, target: str) -> Array:
    """``.relu`` and ``.satfinite``."""
    if "relu" in instruction.parts:
        value = np.where(np.isnan(value), np.float32(np.nan), np.maximum(value, 0) + value.dtype.type(0))
    if "satfinite" in instruction.parts and target in LARGEST:
        value = np.clip(value, -LARGEST[target], LARGEST[target]).astype(value.dtype)
    return value


def _pack_floats(instruction: Instruction, machine: Machine, source: str, target: str) -> Run:
    """Two float32 into one register; the first operand is the upper half."""
    rounding = one_of(instruction, ("rn", "rz"))
    if source != "f32" or target not in ("f16x2", "bf16x2", *FLOAT8_PAIRS) or not rounding:
        raise Unsupported(instruction.opcode)
    if target in FLOAT8_PAIRS and (rounding != "rn" or "satfinite" not in instruction.parts):
        raise Unsupported(instruction.opcode)

    def function(high: Array, low: Array) -> Array:
        pair = np.stack([decode(low, "f32"), decode(high, "f32")], axis=1).reshape(-1)
        pair = _clamped(instruction, pair, target)
        return encode(pair, target, rounding)

    return bitwise(instruction, machine, function, 32)


def _integer_word(value: Array, kind: str, width: int) -> Array:
    """An int64 or uint64 of type ``kind``, sign- or zero-extended into a register of ``width`` bits."""
    return low_integer(value.view(U64), kind).astype(WORD[width])


def _integer_to_integer(instruction: Instruction, source: str, target: str, width: int) -> Function:
    allow(instruction, "sat", target)
    saturate = "sat" in instruction.parts
    low, high = limits(target)

    def function(a: Array) -> Array:
        value = low_integer(a, source)
        if saturate:
            range_of = np.iinfo(value.dtype)
            least, most = value.dtype.type(max(low, range_of.min)), value.dtype.type(min(high, range_of.max))
            value = np.clip(value, least, most)
        return _integer_word(value, target, width)

    return function


def _float_to_integer(instruction: Instruction, source: str, target: str, width: int) -> Function:
    allow(instruction, *_WHOLE, "ftz", "sat", target)
    rounding = one_of(instruction, _WHOLE)
    if not rounding or source in FLOAT8_PAIRS or source.endswith("x2"):
        raise Unsupported(instruction.opcode)
    ftz = "ftz" in instruction.parts and source == "f32"

    def function(a: Array) -> Array:
        value = decode(a, source)
        return _integer_word(to_integer(flush(value) if ftz else value, target, rounding), target, width)

    return function


def _integer_to_float(instruction: Instruction, source: str, target: str) -> Function:
    allow(instruction, *ROUNDINGS, "sat", target)
    rounding, saturate = one_of(instruction, ROUNDINGS), "sat" in instruction.parts
    narrow = bits_of(source) <= 32
    if not rounding or target.endswith("x2") or (rounding != "rn" and not (target == "f32" and narrow)):
        raise Unsupported(instruction.opcode)

    def function(a: Array) -> Array:
        value = low_integer(a, source)
        if not narrow and target in ("f16", "bf16"):  # 53 bits are enough if the last one tells of those lost
            lost = ((value & value.dtype.type(0x7FF)) != 0) & (np.abs(value.astype(np.float64)) >= 2.0**53)
            value = np.where(lost, value | value.dtype.type(0x800), value)
            value = np.where(lost, value & ~value.dtype.type(0x7FF), value)
        if narrow or target != "f32":
            value = value.astype(np.float64)
        word = encode(value, target, rounding)
        if saturate:
            word = encode(np.clip(decode(word, target), 0, 1), target)
        return word

    return function


def _float_to_float(instruction: Instruction, source: str, target: str) -> Function:
    rounding = one_of(instruction, (*ROUNDINGS, *_WHOLE, "rna"))
    ftz, saturate = "ftz" in instruction.parts, "sat" in instruction.parts
    exact = {("f16", "f32"), ("bf16", "f32"), ("f16", "f64"), ("bf16", "f64"), ("f32", "f64")}
    if target == "tf32":
        possible = source == "f32" and rounding in ("rn", "rz", "rna")
    elif rounding in _WHOLE or not rounding:
        possible = source == target or (not rounding and (source, target) in exact)
    elif target == "f32" or target == "f64":
        possible = rounding in ROUNDINGS
    elif target in FLOAT8_PAIRS:
        possible = rounding == "rn" and source == "f16x2" and "satfinite" in instruction.parts
    else:
        possible = rounding in ("rn", "rz")
    if not possible:
        raise Unsupported(instruction.opcode)

    def function(a: Array) -> Array:
        value = decode(a, source)
        if ftz and source == "f32":
            value = flush(value)
        if rounding in _WHOLE:
            value = to_whole(value, rounding)
        if saturate:
            value = np.where(np.isnan(value), value.dtype.type(0), np.clip(value, 0, 1) + value.dtype.type(0))
        value = _clamped(instruction, value, target)
        if target == "tf32":
            word = to_tf32(np.ascontiguousarray(value, np.float32).view(U32), rounding)
            if "satfinite" in instruction.parts:
                finite = np.isfinite(value) & ~np.isfinite(word.view(np.float32))
                word = np.where(finite, (word & U32(0x80000000)) | U32(0x7F7FE000), word)
            return word
        word = encode(value, target, rounding if rounding in ROUNDINGS else "rn")
        if ftz and target == "f32":
            word = encode(flush(decode(word, "f32")), "f32")
        return word

    return function
