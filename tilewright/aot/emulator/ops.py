"""Arithmetic, logic, comparison, conversion and data-movement instructions that act on each thread by itself.

``BUILDERS`` maps the first component of an opcode to a function ``build(ins, machine) -> run`` where ``run(mask)`` executes
the instruction for all threads (``mask is None``) or for those with ``mask`` true.
"""

# mypy: ignore-errors
# ruff: noqa: D102, D103, E501, B007
from __future__ import annotations

import numpy as np

from .numerics import (
    FLOATS,
    U16,
    U32,
    U64,
    WORD,
    bits_of,
    decode,
    encode,
    f32_to_bf16,
    f32_to_f16_toward_zero,
    flush,
    limits,
    low_integer,
    tf32,
    to_integer,
)
from .parser import Imm, Pair, Sym, Vec

BUILDERS = {}


class Unsupported(NotImplementedError):
    """An instruction (or a form of one) that the emulator does not know."""


def builds(*names):
    def register(function):
        for name in names:
            BUILDERS[name] = function
        return function

    return register


def compute(machine, dst, function, sources):
    """An instruction ``dst = function(*sources)`` on register slots."""
    R = machine.registers
    if len(sources) == 1:
        (a,) = sources

        def run(mask):
            value = function(R[a])
            R[dst] = value if mask is None or R[dst] is None else np.where(mask, value, R[dst])
    elif len(sources) == 2:
        a, b = sources

        def run(mask):
            value = function(R[a], R[b])
            R[dst] = value if mask is None or R[dst] is None else np.where(mask, value, R[dst])
    else:

        def run(mask):
            value = function(*[R[s] for s in sources])
            R[dst] = value if mask is None or R[dst] is None else np.where(mask, value, R[dst])

    return run


def simple(ins, machine, function, kind, result=None, source_kinds=None):
    """``function`` on numbers of type ``kind``; ``result`` is the destination type when it differs."""
    result = result or kind
    kinds = source_kinds or [kind] * (len(ins.operands) - 1)
    sources = [machine.source(op, bits_of(k)) for op, k in zip(ins.operands[1:], kinds, strict=False)]
    ftz = "ftz" in ins.parts and kind == "f32"
    saturate = "sat" in ins.parts and kind in FLOATS

    def on_words(*raw):
        numbers = [decode(r, k) for r, k in zip(raw, kinds, strict=False)]
        if ftz:
            numbers = [flush(n) for n in numbers]
        value = function(*numbers)
        if ftz:
            value = flush(np.asarray(value, np.float32))
        if saturate:
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1))
        return encode(value, result)

    return compute(machine, machine.target(ins.operands[0]), on_words, sources)


def words(ins, machine, function, bits):
    """``function`` on raw words of ``bits`` bits (or "pred")."""
    sources = [machine.source(op, bits) for op in ins.operands[1:]]
    return compute(machine, machine.target(ins.operands[0]), function, sources)


# ------------------------------------------------------------------------------------------------------------ arithmetic
def _fused(kind):
    if kind == "f64":
        return lambda a, b, c: a * b + c
    return lambda a, b, c: a.astype(np.float64) * b + c  # the product is exact in float64


def _relu(ins, function):
    return (lambda *x: np.maximum(function(*x), 0)) if "relu" in ins.parts else function


@builds("add", "sub")
def _add(ins, machine):
    kind = ins.parts[-1]
    if "cc" in ins.parts:
        return _with_carry(ins, machine)
    if "sat" in ins.parts and kind == "s32":
        raise Unsupported(ins.opcode)
    function = np.add if ins.parts[0] == "add" else np.subtract
    if kind in FLOATS:
        return simple(ins, machine, function, kind)
    return words(ins, machine, function, bits_of(kind))


def _high(a, b):
    """High half of the product of two 32- or 64-bit integer arrays (their signedness decides)."""
    if a.dtype.itemsize == 4:
        wide = np.int64 if a.dtype == np.int32 else U64
        return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)
    mask, half = U64(0xFFFFFFFF), U64(32)
    x, y = a.view(U64), b.view(U64)
    xl, xh, yl, yh = x & mask, x >> half, y & mask, y >> half
    middle = xh * yl + (xl * yl >> half)
    top = xh * yh + (middle >> half) + (xl * yh + (middle & mask) >> half)
    if a.dtype == np.int64:
        top = top - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
    return top.view(a.dtype)


_WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
_BIG = {"u32": U32, "s32": np.int32, "u64": U64, "s64": np.int64}


@builds("mul")
def _mul(ins, machine):
    kind = ins.parts[-1]
    if kind in FLOATS:
        return simple(ins, machine, np.multiply, kind)
    if ins.parts[1] == "wide":
        wide = _BIG[_WIDE[kind]]
        return simple(ins, machine, lambda a, b: a.astype(wide) * b.astype(wide), kind, _WIDE[kind])
    if ins.parts[1] == "hi":
        if kind in ("u16", "s16"):
            raise Unsupported(ins.opcode)
        return simple(ins, machine, _high, kind)
    return words(ins, machine, np.multiply, bits_of(kind))


@builds(
    "mul24", "mad24", "sad", "bfind", "fns", "slct", "testp", "call", "brx", "tex", "wmma", "tcgen05", "bmsk", "set"
)
def _unsupported(ins, machine):
    raise Unsupported(ins.opcode)


@builds("mad", "fma")
def _mad(ins, machine):
    kind = ins.parts[-1]
    if kind in FLOATS:
        return simple(ins, machine, _relu(ins, _fused(kind)), kind)
    if "cc" in ins.parts:
        return _with_carry(ins, machine)
    if ins.parts[1] == "wide":
        wide, result = _BIG[_WIDE[kind]], _WIDE[kind]
        return simple(
            ins, machine, lambda a, b, c: a.astype(wide) * b.astype(wide) + c, kind, result, [kind, kind, result]
        )
    if ins.parts[1] == "hi":
        return simple(ins, machine, lambda a, b, c: _high(a, b) + c, kind)
    return words(ins, machine, lambda a, b, c: a * b + c, bits_of(kind))


@builds("addc", "subc", "madc")
def _with_carry(ins, machine):
    """Extended precision: the condition code is one more register. 32-bit types only."""
    name, kind = ins.parts[0].removesuffix("c"), ins.parts[-1]
    if bits_of(kind) != 32:
        raise Unsupported(ins.opcode)
    reads, writes = ins.parts[0] != name, "cc" in ins.parts
    flag = machine.condition_code()
    target = machine.target(ins.operands[0])
    sources = [machine.source(op, 32) for op in ins.operands[1:]]
    R = machine.registers

    def run(mask):
        values = [R[s] for s in sources]
        if name == "mad":
            product = decode(values[0], kind), decode(values[1], kind)
            product = _high(*product).view(U32) if ins.parts[1] == "hi" else values[0] * values[1]
            values = [product, values[2]]
        a, b = (v.astype(np.int64) for v in values)
        carry = R[flag].astype(np.int64) if reads else 0
        total = a - b - carry if name == "sub" else a + b + carry
        machine.write(target, (total & 0xFFFFFFFF).astype(U32), mask)
        if writes:
            machine.write(flag, (total >> 32) != 0, mask)

    return run


def _quotient(a, b):
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * safe != a))
    return quotient.astype(a.dtype)


@builds("div")
def _div(ins, machine):
    kind = ins.parts[-1]
    if kind in FLOATS:
        return simple(ins, machine, np.divide, kind)
    ones = _BIG.get(kind, U16)(-1 if kind[0] == "s" else limits(kind)[1])
    return simple(ins, machine, lambda a, b: np.where(b == 0, ones, _quotient(a, b)), kind)


@builds("rem")
def _rem(ins, machine):
    return simple(
        ins, machine, lambda a, b: np.where(b == 0, a, a - _quotient(a, b) * b).astype(a.dtype), ins.parts[-1]
    )


def _nan_aware(ordinary, propagating):
    def build(ins, machine):
        kind = ins.parts[-1]
        if kind not in FLOATS:
            return simple(ins, machine, _relu(ins, propagating), kind)
        two = propagating if "NaN" in ins.parts else ordinary
        if "xorsign" in ins.parts:  # min.xorsign.abs: of the magnitudes, with the product's sign
            plain = two

            def two(a, b):
                return np.copysign(plain(np.abs(a), np.abs(b)), np.where(np.signbit(a) ^ np.signbit(b), -1.0, 1.0))

        return simple(ins, machine, two if len(ins.operands) == 3 else lambda a, b, c: two(two(a, b), c), kind)

    return build


BUILDERS["min"] = _nan_aware(np.fmin, np.minimum)
BUILDERS["max"] = _nan_aware(np.fmax, np.maximum)


@builds("neg")
def _neg(ins, machine):
    kind = ins.parts[-1]
    sign = {
        "f16": 0x8000,
        "bf16": 0x8000,
        "f32": 1 << 31,
        "f64": 1 << 63,
        "f16x2": 0x80008000,
        "bf16x2": 0x80008000,
    }.get(kind)
    if sign is None:
        return words(ins, machine, np.negative, bits_of(kind))
    flip = WORD[bits_of(kind)](sign)
    return words(ins, machine, lambda a: a ^ flip, bits_of(kind))


@builds("abs")
def _abs(ins, machine):
    kind = ins.parts[-1]
    keep = {
        "f16": 0x7FFF,
        "bf16": 0x7FFF,
        "f32": (1 << 31) - 1,
        "f64": (1 << 63) - 1,
        "f16x2": 0x7FFF7FFF,
        "bf16x2": 0x7FFF7FFF,
    }.get(kind)
    if keep is None:
        return simple(ins, machine, np.abs, kind)
    mask = WORD[bits_of(kind)](keep)
    return words(ins, machine, lambda a: a & mask, bits_of(kind))


_UNARY = {
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
def _unary(ins, machine):
    function = _UNARY[ins.parts[0]]
    return simple(ins, machine, lambda a: function(a.astype(np.float64)), ins.parts[-1])


@builds("copysign")
def _copysign(ins, machine):
    return simple(ins, machine, lambda a, b: np.copysign(b, a), ins.parts[-1])


# ---------------------------------------------------------------------------------------------------------------- logic
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@builds(*_LOGIC)
def _logic(ins, machine):
    bits = "pred" if ins.parts[-1] == "pred" else bits_of(ins.parts[-1])
    return words(ins, machine, _LOGIC[ins.parts[0]], bits)


def _shift(ins, machine, left):
    kind = ins.parts[-1]
    bits = bits_of(kind)
    word = WORD[bits]
    top = U32(bits - 1)
    sources = [machine.source(ins.operands[1], bits), machine.source(ins.operands[2], 32)]
    if left:

        def function(a, n):
            return np.where(n > top, word(0), a << np.minimum(n, top).astype(word))
    elif kind[0] == "s":
        signed = {16: np.int16, 32: np.int32, 64: np.int64}[bits]

        def function(a, n):
            return (a.view(signed) >> np.minimum(n, top).astype(signed)).view(word)
    else:

        def function(a, n):
            return np.where(n > top, word(0), a >> np.minimum(n, top).astype(word))

    return compute(machine, machine.target(ins.operands[0]), function, sources)


@builds("shl")
def _shl(ins, machine):
    return _shift(ins, machine, True)


@builds("shr")
def _shr(ins, machine):
    return _shift(ins, machine, False)


@builds("shf")
def _shf(ins, machine):
    left, wrap = ins.parts[1] == "l", ins.parts[2] == "wrap"

    def function(low, high, n):
        both = high.astype(U64) << U64(32) | low.astype(U64)
        n = (n & U32(31) if wrap else np.minimum(n, U32(32))).astype(U64)
        return (both << n >> U64(32) if left else both >> n).astype(U32)

    return words(ins, machine, function, 32)


@builds("lop3")
def _lop3(ins, machine):
    if not isinstance(ins.operands[4], Imm):
        raise Unsupported(ins.opcode)
    table = ins.operands[4].value

    def function(a, b, c):
        out = np.zeros_like(a)
        for row in range(8):
            if table >> row & 1:
                out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return out

    sources = [machine.source(op, 32) for op in ins.operands[1:4]]
    return compute(machine, machine.target(ins.operands[0]), function, sources)


@builds("prmt")
def _prmt(ins, machine):
    if len(ins.parts) > 2:
        raise Unsupported(ins.opcode)

    def function(a, b, selector):
        pool = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], axis=1)
        nibble = (selector[:, None] >> np.array([0, 4, 8, 12], U32)) & U32(15)
        byte = np.take_along_axis(pool, (nibble & U32(7)).astype(np.int64), axis=1)
        sign = np.where(byte & 0x80, np.uint8(255), np.uint8(0))
        return np.where(nibble & U32(8), sign, byte).view(U32).reshape(-1)

    return words(ins, machine, function, 32)


@builds("bfe")
def _bfe(ins, machine):
    kind = ins.parts[-1]
    bits = bits_of(kind)
    word, signed = WORD[bits], kind[0] == "s"
    sources = [machine.source(ins.operands[1], bits)] + [machine.source(op, 32) for op in ins.operands[2:]]

    def function(a, position, length):
        position, length = (position & U32(255)).astype(np.int64), (length & U32(255)).astype(np.int64)
        wide = low_integer(a, ("s" if signed else "u") + str(bits))
        shifted = wide >> np.minimum(position, 63).astype(wide.dtype)
        spare = np.clip(64 - length, 0, 63).astype(wide.dtype)
        field = (shifted << spare) >> spare
        if signed:
            beyond = position + length > bits
            field = np.where(beyond, shifted, field)
        elif bits == 32:
            field = np.where(position >= 32, U64(0), field)
        return np.where(length == 0, 0, field).astype(np.int64 if signed else U64).astype(word)

    return compute(machine, machine.target(ins.operands[0]), function, sources)


@builds("bfi")
def _bfi(ins, machine):
    bits = bits_of(ins.parts[-1])
    word = WORD[bits]
    sources = [machine.source(op, bits) for op in ins.operands[1:3]] + [
        machine.source(op, 32) for op in ins.operands[3:]
    ]

    def function(a, b, position, length):
        position, length = (position & U32(255)).astype(U64), (length & U32(255)).astype(U64)
        ones = np.where(length >= U64(64), ~U64(0), (U64(1) << np.minimum(length, U64(63))) - U64(1))
        at = np.minimum(position, U64(63))
        field = np.where(position > U64(63), U64(0), ones << at)
        return (b.astype(U64) & ~field | (a.astype(U64) << at) & field).astype(word)

    return compute(machine, machine.target(ins.operands[0]), function, sources)


@builds("popc")
def _popc(ins, machine):
    bits = bits_of(ins.parts[-1])
    return words(ins, machine, lambda a: np.bitwise_count(a).astype(U32), bits)


@builds("clz")
def _clz(ins, machine):
    bits = bits_of(ins.parts[-1])

    def function(a):
        count = np.full(a.shape, bits, U32)
        for bit in range(bits):
            count[(a >> a.dtype.type(bit)) & a.dtype.type(1) == 1] = bits - 1 - bit
        return count

    return words(ins, machine, function, bits)


@builds("brev")
def _brev(ins, machine):
    bits = bits_of(ins.parts[-1])
    word = WORD[bits]

    def function(a):
        out = np.zeros_like(a)
        for bit in range(bits):
            out |= ((a >> word(bit)) & word(1)) << word(bits - 1 - bit)
        return out

    return words(ins, machine, function, bits)


@builds("dp4a")
def _dp4a(ins, machine):
    byte = {"s32": np.int8, "u32": np.uint8}
    left, right = byte[ins.parts[-2]], byte[ins.parts[-1]]

    def function(a, b, c):
        products = a.view(left).astype(np.int64) * b.view(right).astype(np.int64)
        return (products.reshape(-1, 4).sum(1) + c.astype(np.int64)).astype(U32)

    return words(ins, machine, function, 32)


# ----------------------------------------------------------------------------------------------- comparison and selection
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _comparison(name, kind):
    if name in ("num", "nan"):
        return (
            (lambda a, b: ~(np.isnan(a) | np.isnan(b))) if name == "num" else (lambda a, b: np.isnan(a) | np.isnan(b))
        )
    if kind in FLOATS:
        if name == "ne":  # the ordered form is false when an operand is NaN
            return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
        if name.endswith("u") and name[:-1] in _COMPARE:
            ordered = _COMPARE[name[:-1]]
            return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    return _COMPARE[name]


@builds("setp")
def _setp(ins, machine):
    kind = ins.parts[-1]
    compare = _comparison(ins.parts[1], kind)
    combine = next((_LOGIC[p] for p in ins.parts[2:-1] if p in ("and", "or", "xor")), None)
    sources = [machine.source(op, bits_of(kind)) for op in ins.operands[1:3]]
    if combine is not None:
        sources.append(machine.source(ins.operands[3], "pred"))
    first = ins.operands[0].first if isinstance(ins.operands[0], Pair) else ins.operands[0]
    ftz = "ftz" in ins.parts and kind == "f32"

    def plain(a, b):
        a, b = decode(a, kind), decode(b, kind)
        return compare(flush(a), flush(b)) if ftz else compare(a, b)

    def function(a, b, p=None):
        return plain(a, b) if p is None else combine(plain(a, b), p)

    if kind in ("f16x2", "bf16x2"):
        raise Unsupported(ins.opcode)
    run = compute(machine, machine.target(first), function, sources)
    if not isinstance(ins.operands[0], Pair):
        return run

    def opposite(a, b, p=None):
        return ~plain(a, b) if p is None else combine(~plain(a, b), p)

    second = compute(machine, machine.target(ins.operands[0].second), opposite, sources)

    def both(mask):
        run(mask)
        second(mask)

    return both


@builds("selp")
def _selp(ins, machine):
    bits = bits_of(ins.parts[-1])
    sources = [machine.source(op, bits) for op in ins.operands[1:3]] + [machine.source(ins.operands[3], "pred")]
    return compute(machine, machine.target(ins.operands[0]), lambda a, b, p: np.where(p, a, b), sources)


# -------------------------------------------------------------------------------------------------------------- movement
@builds("mov")
def _mov(ins, machine):
    kind = ins.parts[-1]
    bits = "pred" if kind == "pred" else bits_of(kind)
    target, source = ins.operands
    if isinstance(target, Vec):
        part = bits // len(target.items)
        if part not in (16, 32):
            raise Unsupported(ins.opcode)
        slots = [None if item == Sym("_") else machine.target(item) for item in target.items]
        origin, R = machine.source(source, bits), machine.registers

        def unpack(mask):
            pieces = R[origin].view(WORD[part]).reshape(-1, len(slots))
            for i, slot in enumerate(slots):
                if slot is not None:
                    machine.write(slot, np.ascontiguousarray(pieces[:, i]), mask)

        return unpack
    if isinstance(source, Vec):
        part = bits // len(source.items)
        if part not in (16, 32):
            raise Unsupported(ins.opcode)
        sources = [machine.source(item, part) for item in source.items]
        word = WORD[bits]
        return compute(machine, machine.target(target), lambda *x: np.stack(x, axis=1).view(word).reshape(-1), sources)
    if kind == "pred" and isinstance(source, Imm):
        source = Imm(int(source.value != 0))
    return compute(machine, machine.target(target), lambda a: a, [machine.source(source, bits)])


@builds("cvta")
def _cvta(ins, machine):
    if "shared" in ins.parts:
        raise Unsupported(ins.opcode + " (generic addresses of shared memory)")
    return words(ins, machine, lambda a: a, 64)


@builds("isspacep")
def _isspacep(ins, machine):
    answer = ins.parts[1] == "global"
    return words(ins, machine, lambda a: np.full(a.shape, answer), 64)


# ------------------------------------------------------------------------------------------------------------ conversion
_FP8 = {"e4m3x2": "float8_e4m3fn", "e5m2x2": "float8_e5m2"}


def _fp8_encode(value, kind):
    import torch

    top = 448.0 if kind == "e4m3x2" else 57344.0
    clipped = torch.from_numpy(np.clip(value.astype(np.float32), -top, top))  # NaN stays NaN
    return clipped.to(getattr(torch, _FP8[kind])).view(torch.uint8).numpy()


def _fp8_decode(raw, kind):
    import torch

    return torch.from_numpy(raw.view(np.uint8).copy()).view(getattr(torch, _FP8[kind])).to(torch.float32).numpy()


def _integer_word(value, kind, bits):
    """An integer of type ``kind`` sign- or zero-extended into a register of ``bits`` bits."""
    return low_integer(value.view(U64) if value.dtype.itemsize == 8 else value, kind).astype(WORD[bits])


@builds("cvt")
def _cvt(ins, machine):
    source, target = ins.parts[-1], ins.parts[-2]
    rounding = next(
        (p for p in ins.parts[1:-2] if p in ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")), None
    )
    relu = "relu" in ins.parts
    known = FLOATS | set(_FP8)
    slot = machine.target(ins.operands[0])
    bits = machine.width(ins.operands[0])

    if len(ins.operands) == 3:  # two float32 packed into one register; the first operand is the upper half
        if source != "f32" or target not in ("f16x2", "bf16x2", *_FP8) or rounding not in ("rn", "rz"):
            raise Unsupported(ins.opcode)
        if rounding == "rz" and target != "bf16x2":
            raise Unsupported(ins.opcode)

        def pack(high, low):
            pair = np.stack([decode(low, "f32"), decode(high, "f32")], axis=1).reshape(-1)
            if relu:
                pair = np.where(pair > 0, pair, 0 * pair)
            if target in _FP8:
                return _fp8_encode(pair, target).view(U16)
            if target == "bf16x2":
                return f32_to_bf16(pair, rounding).view(U32)
            return encode(pair, target)

        return compute(machine, slot, pack, [machine.source(op, 32) for op in ins.operands[1:]])

    origin_bits = machine.width(ins.operands[1])
    origin = machine.source(ins.operands[1], origin_bits or (16 if source in _FP8 else max(bits_of(source), 16)))
    to_float, from_float = target in known, source in known
    if not to_float and not from_float:
        saturate = "sat" in ins.parts

        def function(a):
            value = low_integer(a, source)
            if saturate:
                low, high = limits(target)
                low = max(low, 0) if value.dtype == U64 else low
                value = np.clip(value, value.dtype.type(low), value.dtype.type(min(high, np.iinfo(value.dtype).max)))
            return _integer_word(value, target, bits)
    elif from_float and not to_float:

        def function(a):
            value = decode(a, source)
            if "ftz" in ins.parts:
                value = flush(value)
            return _integer_word(to_integer(value, target, rounding), target, bits)
    elif not from_float:
        if rounding != "rn":
            raise Unsupported(ins.opcode)

        def function(a):
            value = low_integer(a, source)
            if target == "bf16" or target == "f16":
                value = value.astype(np.float64)  # 16-bit targets: a second rounding cannot occur below 2**53
                value = value.astype(np.float16) if target == "f16" else value
            return encode(value, target)
    else:
        if rounding not in (None, "rn", "rna", "rni", "rzi", "rmi", "rpi") and not (
            target in ("bf16", "f16") and rounding == "rz"
        ):
            raise Unsupported(ins.opcode)
        saturate, ftz = "sat" in ins.parts, "ftz" in ins.parts
        whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.get(rounding)

        def function(a):
            if target == "tf32":
                return tf32(a, away=True)
            value = _fp8_decode(a, source) if source in _FP8 else decode(a, source)
            if whole:
                value = whole(value)
            if ftz and source == "f32":
                value = flush(value)
            if saturate:
                value = np.where(np.isnan(value), 0, np.clip(value, 0, 1))
            if relu:
                value = np.where(value > 0, value, 0 * value)
            if target in _FP8:
                return _fp8_encode(value, target).view(U16)
            if target == "bf16":
                return f32_to_bf16(value, "rz" if rounding == "rz" else "rn")
            if rounding == "rz":
                return f32_to_f16_toward_zero(value)
            return encode(value, target)

    return compute(machine, slot, function, [origin])
