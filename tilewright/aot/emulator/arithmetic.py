"""Arithmetic of single threads, integer and float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.aot.emulator.errors import Unsupported
from tilewright.aot.emulator.machine import Machine
from tilewright.aot.emulator.numerics import (
    FLOATS,
    NATIVE,
    U32,
    U64,
    WORD,
    Array,
    bits_of,
    decode,
    flush,
    fused_multiply_add,
    limits,
    low_integer,
    odd_sum,
)
from tilewright.aot.emulator.program import Instruction
from tilewright.aot.emulator.registry import (
    BUILDERS,
    ROUNDINGS,
    Builder,
    Function,
    Mask,
    Run,
    allow,
    bitwise,
    builds,
    numeric,
    one_of,
)

_WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
_FLOAT_MODIFIERS = (*ROUNDINGS, "ftz", "sat")


def _with_relu(instruction: Instruction, function: Function) -> Function:
    return (lambda *x: np.maximum(function(*x), 0)) if "relu" in instruction.parts else function


def _on_floats(instruction: Instruction, machine: Machine, function: Function, exact: Function) -> Run:
    """``function`` of two floats; where the rounding is directed, ``exact`` of them as float64."""
    if one_of(instruction, ROUNDINGS, "rn") == "rn":
        return numeric(instruction, machine, function, instruction.kind)
    return numeric(instruction, machine, lambda a, b: exact(a.astype(np.float64), b), instruction.kind)


@builds("add", "sub")
def _add(instruction: Instruction, machine: Machine) -> Run:
    kind, subtract = instruction.kind, instruction.parts[0] == "sub"
    function = np.subtract if subtract else np.add
    if kind in FLOATS:
        allow(instruction, *_FLOAT_MODIFIERS)
        sign = np.float64(-1 if subtract else 1)
        return _on_floats(instruction, machine, function, lambda a, b: odd_sum(a, b * sign))
    if "cc" in instruction.parts:
        return _with_carry(instruction, machine)
    allow(instruction, "sat")
    if "sat" in instruction.parts:
        low, high = limits(kind)

        def saturating(a: Array, b: Array) -> Array:
            exact = function(low_integer(a, kind), low_integer(b, kind))
            return np.clip(exact, low, high).astype(np.int32).view(U32)

        if kind != "s32":
            raise Unsupported(instruction.opcode)
        return bitwise(instruction, machine, saturating, 32)
    if kind.endswith("x2"):
        return numeric(instruction, machine, function, kind)
    return bitwise(instruction, machine, function, bits_of(kind))


def _high(a: Array, b: Array) -> Array:
    """High half of the product of two integer arrays (their signedness decides)."""
    size = a.dtype.itemsize
    if size < 8:
        wide = np.int64 if a.dtype.kind == "i" else U64
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * size)).astype(a.dtype)
    mask, half = U64(0xFFFFFFFF), U64(32)
    x, y = a.view(U64), b.view(U64)
    xl, xh, yl, yh = x & mask, x >> half, y & mask, y >> half
    middle = xh * yl + ((xl * yl) >> half)
    top = xh * yh + (middle >> half) + ((xl * yh + (middle & mask)) >> half)
    if a.dtype.kind == "i":
        top = top - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
    return top.view(a.dtype)


@builds("mul")
def _mul(instruction: Instruction, machine: Machine) -> Run:
    kind = instruction.kind
    if kind in FLOATS:
        allow(instruction, *_FLOAT_MODIFIERS)
        return _on_floats(instruction, machine, np.multiply, np.multiply)
    allow(instruction, "lo", "hi", "wide")
    if "wide" in instruction.parts:
        wide = NATIVE[_WIDE[kind]]
        return numeric(instruction, machine, lambda a, b: a.astype(wide) * b.astype(wide), kind, _WIDE[kind])
    if "hi" in instruction.parts:
        return numeric(instruction, machine, _high, kind)
    return bitwise(instruction, machine, np.multiply, bits_of(kind))


@builds("mad", "fma")
def _mad(instruction: Instruction, machine: Machine) -> Run:
    kind = instruction.kind
    if kind in FLOATS:
        allow(instruction, *_FLOAT_MODIFIERS, "relu")
        if kind == "f64":
            return numeric(instruction, machine, _fused_f64, kind)
        return numeric(instruction, machine, _with_relu(instruction, fused_multiply_add), kind)
    if "cc" in instruction.parts:
        return _with_carry(instruction, machine)
    allow(instruction, "lo", "hi", "wide")
    if "wide" in instruction.parts:
        wide, result = NATIVE[_WIDE[kind]], _WIDE[kind]
        kinds = [kind, kind, result]
        return numeric(instruction, machine, lambda a, b, c: a.astype(wide) * b.astype(wide) + c, kind, result, kinds)
    if "hi" in instruction.parts:
        return numeric(instruction, machine, lambda a, b, c: _high(a, b) + c, kind)
    return bitwise(instruction, machine, lambda a, b, c: a * b + c, bits_of(kind))


def _fused_f64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in doubled precision (Dekker's product, Knuth's sum), rounded to float64: ties may go astray."""
    split = np.float64((1 << 27) + 1)

    def halves(x: Array) -> tuple[Array, Array]:
        high = x * split - (x * split - x)
        return high, x - high

    product = a * b
    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    lost = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    total = product + c
    part = total - product
    lost = lost + ((product - (total - part)) + (c - part))
    return np.where(np.isfinite(lost), total + lost, total)


@builds("addc", "subc", "madc")
def _with_carry(instruction: Instruction, machine: Machine) -> Run:
    """Extended precision: the condition code is one more register."""
    allow(instruction, "cc", "lo", "hi")
    name, kind = instruction.parts[0].removesuffix("c"), instruction.kind
    width = bits_of(kind)
    if width not in (32, 64):
        raise Unsupported(instruction.opcode)
    reads, writes = instruction.parts[0] != name, "cc" in instruction.parts
    word, high = WORD[width], "hi" in instruction.parts
    flag = machine.condition_code()
    target = machine.target(instruction.operands[0])
    sources = [machine.source(op, width) for op in instruction.operands[1:]]
    values = machine.values

    def run(mask: Mask) -> None:
        operands = [values[source] for source in sources]
        if name == "mad":
            product = _high(decode(operands[0], kind), decode(operands[1], kind)).view(word) if high else None
            operands = [operands[0] * operands[1] if product is None else product, operands[2]]
        a, b = operands
        carry = values[flag].astype(word) if reads else np.zeros(len(a), word)
        if name == "sub":
            part = a - b
            total = part - carry
            out = (a < b) | (part < carry)
        else:
            part = a + b
            total = part + carry
            out = (part < a) | (total < part)
        machine.write(target, total, mask)
        if writes:
            machine.write(flag, out, mask)

    return run


def _quotient(a: Array, b: Array) -> Array:
    """Integer quotient cut toward zero; of a division by zero, anything."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * safe != a))
    return quotient.astype(a.dtype)


@builds("div")
def _div(instruction: Instruction, machine: Machine) -> Run:
    kind = instruction.kind
    if kind in FLOATS:
        allow(instruction, *ROUNDINGS, "ftz", "approx", "full")
        # A quotient of float32 that is no float32 is far from one, so float64 tells the side.
        return _on_floats(instruction, machine, np.divide, np.divide)
    allow(instruction)
    ones = NATIVE[kind](-1 if kind[0] == "s" else limits(kind)[1])
    return numeric(instruction, machine, lambda a, b: np.where(b == 0, ones, _quotient(a, b)), kind)


@builds("rem")
def _rem(instruction: Instruction, machine: Machine) -> Run:
    allow(instruction)
    return numeric(instruction, machine, lambda a, b: np.where(b == 0, a, a - _quotient(a, b) * b), instruction.kind)


def _choice(
    ignoring: Callable[..., Array], propagating: Callable[..., Array], zero_sign: Callable[..., Array]
) -> Builder:
    """Builder of min or max. ``zero_sign``: whether the result of two zeros is negative, as -0 is less than +0."""

    def of_two(a: Array, b: Array, function: Callable[..., Array]) -> Array:
        result = function(a, b)
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            negative = zero_sign(np.signbit(a), np.signbit(b))
            result = np.where(zeros, np.where(negative, a.dtype.type(-0.0), a.dtype.type(0)), result)
        return result

    def build(instruction: Instruction, machine: Machine) -> Run:
        kind = instruction.kind
        if kind not in FLOATS:
            allow(instruction, "relu")
            return numeric(instruction, machine, _with_relu(instruction, propagating), kind)
        allow(instruction, "ftz", "NaN", "xorsign", "abs")
        function = propagating if "NaN" in instruction.parts else ignoring

        def two(a: Array, b: Array) -> Array:
            if "xorsign" not in instruction.parts:
                return of_two(a, b, function)
            sign = np.where(np.signbit(a) ^ np.signbit(b), -1.0, 1.0)  # of the magnitudes, with the product's sign
            return np.copysign(function(np.abs(a), np.abs(b)), sign).astype(a.dtype)

        if len(instruction.operands) == 3:
            return numeric(instruction, machine, two, kind)
        return numeric(instruction, machine, lambda a, b, c: two(two(a, b), c), kind)

    return build


BUILDERS["min"] = _choice(np.fmin, np.minimum, np.logical_or)
BUILDERS["max"] = _choice(np.fmax, np.maximum, np.logical_and)

_SIGN = {"f16": 0x8000, "bf16": 0x8000, "f32": 1 << 31, "f64": 1 << 63, "f16x2": 0x80008000, "bf16x2": 0x80008000}


@builds("neg", "abs")
def _sign(instruction: Instruction, machine: Machine) -> Run:
    kind, negate = instruction.kind, instruction.parts[0] == "neg"
    bits = bits_of(kind)
    if kind not in _SIGN:
        allow(instruction)
        if negate:
            return bitwise(instruction, machine, np.negative, bits)
        return numeric(instruction, machine, np.abs, kind)
    allow(instruction, "ftz")
    sign = WORD[bits](_SIGN[kind])
    ftz = "ftz" in instruction.parts

    def function(a: Array) -> Array:
        if ftz:
            a = np.where(flush(decode(a, kind)) == 0, a & sign, a)
        return a ^ sign if negate else a & ~sign

    if ftz and kind != "f32":
        raise Unsupported(instruction.opcode)
    return bitwise(instruction, machine, function, bits)


_UNARY: dict[str, Function] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@builds(*_UNARY)
def _unary(instruction: Instruction, machine: Machine) -> Run:
    """Rounded to nearest from float64, also where the ISA allows an error."""
    allow(instruction, *ROUNDINGS, "approx", "ftz")
    function = _UNARY[instruction.parts[0]]
    return numeric(instruction, machine, lambda a: function(a.astype(np.float64)), instruction.kind)


@builds("copysign")
def _copysign(instruction: Instruction, machine: Machine) -> Run:
    allow(instruction)
    return numeric(instruction, machine, lambda a, b: np.copysign(b, a), instruction.kind)


@builds("dp4a")
def _dp4a(instruction: Instruction, machine: Machine) -> Run:
    """d = c + sum of the four products of the bytes of a and b."""
    byte: dict[str, Any] = {"s32": np.int8, "u32": np.uint8}
    left, right = byte[instruction.parts[-2]], byte[instruction.parts[-1]]

    def function(a: Array, b: Array, c: Array) -> Array:
        products = a.view(left).astype(np.int64) * b.view(right).astype(np.int64)
        return (products.reshape(-1, 4).sum(axis=1) + c.astype(np.int64)).astype(U32)

    return bitwise(instruction, machine, function, 32)
