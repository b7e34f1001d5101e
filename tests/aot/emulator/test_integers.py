"""Single integer instructions against Python's integers, on edge values and random words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.aot.emulator.programs import M32, M64, execute, inputs, s


def tdiv(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def prmt(a: int, b: int, c: int) -> int:
    pool, out = (b << 32 | a).to_bytes(8, "little"), 0
    for i in range(4):
        nibble = c >> 4 * i & 15
        byte = pool[nibble & 7]
        out |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * i
    return out


def bfe(a: int, position: int, length: int, signed: bool) -> int:
    position, length = position & 255, length & 255
    top = min(position + length - 1, 31)
    sign = (a >> top & 1) if signed and length else 0
    return sum(((a >> position + i & 1) if i < length and position + i <= 31 else sign) << i for i in range(32))


def bfi(a: int, b: int, position: int, length: int) -> int:
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i < 32:
            b = b & ~(1 << position + i) | (a >> i & 1) << position + i
    return b


def lop3(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))


PRMT_MODES = {
    "f4e": ("3210", "4321", "5432", "6543"),
    "b4e": ("5670", "6701", "7012", "0123"),
    "rc8": ("0000", "1111", "2222", "3333"),
    "ecl": ("3210", "3211", "3222", "3333"),
    "ecr": ("0000", "1110", "2210", "3210"),
    "rc16": ("1010", "3232", "1010", "3232"),
}


def halves(a: int, b: int, function: Callable[[int, int], int], signed: bool) -> int:
    """``function`` of the two 16-bit halves apart."""
    out = 0
    for shift in (0, 16):
        x, y = (s(v >> shift & 0xFFFF, 16) if signed else v >> shift & 0xFFFF for v in (a, b))
        out |= (function(x, y) & 0xFFFF) << shift
    return out


def clamp(value: int, bits: int = 32, signed: bool = True) -> int:
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return max(low, min(high, value))


def saturated_bytes(a: int, b: int, c: int, signed: bool) -> int:
    return c << 16 | (clamp(s(a), 8, signed) & 255) << 8 | clamp(s(b), 8, signed) & 255


BYTES_OF_B = "cvt.u16.u32 %rs1, %r2; shr.u16 %rs2, %rs1, 8; mov.b16 %rs3, 0x81; mov.b16 %rs4, 3;"

INTEGER = {
    "add.sat.s32 %r4, %r1, %r2;": lambda a, b, c: clamp(s(a) + s(b)),
    "sub.sat.s32 %r4, %r1, %r2;": lambda a, b, c: clamp(s(a) - s(b)),
    "add.s16x2 %r4, %r1, %r2;": lambda a, b, c: halves(a, b, lambda x, y: x + y, True),
    "add.u16x2 %r4, %r1, %r2;": lambda a, b, c: halves(a, b, lambda x, y: x + y, False),
    "min.s16x2 %r4, %r1, %r2;": lambda a, b, c: halves(a, b, min, True),
    "max.u16x2 %r4, %r1, %r2;": lambda a, b, c: halves(a, b, max, False),
    "max.relu.s32 %r4, %r1, %r2;": lambda a, b, c: max(s(a), s(b), 0),
    "cvt.u16.u32 %rs1, %r1; cvt.u16.u32 %rs2, %r2; mul.hi.u16 %rs3, %rs1, %rs2; cvt.u32.u16 %r4, %rs3;": (
        lambda a, b, c: (a & 0xFFFF) * (b & 0xFFFF) >> 16
    ),
    "cvt.u16.u32 %rs1, %r1; cvt.u16.u32 %rs2, %r2; mul.hi.s16 %rs3, %rs1, %rs2; cvt.s32.s16 %r4, %rs3;": (
        lambda a, b, c: s(a & 0xFFFF, 16) * s(b & 0xFFFF, 16) >> 16
    ),
    "cvt.u16.u32 %rs1, %r1; shl.b16 %rs1, %rs1, %r2; cvt.u32.u16 %r4, %rs1;": (
        lambda a, b, c: a << b & 0xFFFF if b < 16 else 0
    ),
    "cvt.u16.u32 %rs1, %r1; shr.s16 %rs1, %rs1, %r2; cvt.s32.s16 %r4, %rs1;": (
        lambda a, b, c: s(a & 0xFFFF, 16) >> min(b, 15)
    ),
    "shf.l.clamp.b32 %r4, %r1, %r2, %r3;": lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32,
    "cvt.pack.sat.s8.s32.b32 %r4, %r1, %r2, %r3;": lambda a, b, c: saturated_bytes(a, b, c, True),
    "cvt.pack.sat.u8.s32.b32 %r4, %r1, %r2, %r3;": lambda a, b, c: saturated_bytes(a, b, c, False),
    "cvt.pack.sat.s16.s32 %r4, %r1, %r2;": (
        lambda a, b, c: (clamp(s(a), 16) & 0xFFFF) << 16 | clamp(s(b), 16) & 0xFFFF
    ),
    BYTES_OF_B + "mov.b32 %r4, {%rs1, %rs2, %rs3, %rs4};": lambda a, b, c: 0x03810000 | b & 0xFFFF,
    "{ .reg .b8 %b<4>; mov.b32 {%b0, %b1, %b2, %b3}, %r1; mov.b32 %r4, {%b3, %b0, %b2, %b1}; }": (
        lambda a, b, c: a >> 24 | (a & 255) << 8 | a & 0xFF0000 | (a >> 8 & 255) << 24
    ),
    "mov.b32 {%rs1, _, _, %rs2}, %r1; mov.b32 %r4, {%rs2, %rs1};": lambda a, b, c: (a & 255) << 16 | a >> 24,
    "setp.gt.s32 %p1, %r1, 0; setp.lt.and.s32 %p2|%p3, %r1, %r2, !%p1; selp.b32 %r5, 1, 0, %p2; "
    "selp.b32 %r6, 2, 0, %p3; or.b32 %r4, %r5, %r6;": (lambda a, b, c: 0 if s(a) > 0 else 1 if s(a) < s(b) else 2),
    **{
        f"prmt.b32.{mode} %r4, %r1, %r2, %r3;": (lambda a, b, c, table=table: prmt(a, b, int(table[c & 3], 16)))
        for mode, table in PRMT_MODES.items()
    },
    "add.s32 %r4, %r1, %r2;": lambda a, b, c: a + b,
    "sub.s32 %r4, %r1, %r2;": lambda a, b, c: a - b,
    "mul.lo.s32 %r4, %r1, %r2;": lambda a, b, c: a * b,
    "mul.hi.u32 %r4, %r1, %r2;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %r4, %r1, %r2;": lambda a, b, c: s(a) * s(b) >> 32,
    "mad.lo.s32 %r4, %r1, %r2, %r3;": lambda a, b, c: a * b + c,
    "div.s32 %r4, %r1, %r2;": lambda a, b, c: tdiv(s(a), s(b)) if b else M32,
    "div.u32 %r4, %r1, %r2;": lambda a, b, c: a // b if b else M32,
    "rem.s32 %r4, %r1, %r2;": lambda a, b, c: s(a) - tdiv(s(a), s(b)) * s(b) if b else a,
    "rem.u32 %r4, %r1, %r2;": lambda a, b, c: a % b if b else a,
    "shl.b32 %r4, %r1, %r2;": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 %r4, %r1, %r2;": lambda a, b, c: a >> min(b, 32),
    "shr.s32 %r4, %r1, %r2;": lambda a, b, c: s(a) >> min(b, 31),
    "shf.l.wrap.b32 %r4, %r1, %r2, %r3;": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.wrap.b32 %r4, %r1, %r2, %r3;": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "shf.r.clamp.b32 %r4, %r1, %r2, %r3;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "min.s32 %r4, %r1, %r2;": lambda a, b, c: min(s(a), s(b)),
    "max.u32 %r4, %r1, %r2;": lambda a, b, c: max(a, b),
    "neg.s32 %r4, %r1;": lambda a, b, c: -a,
    "abs.s32 %r4, %r1;": lambda a, b, c: abs(s(a)),
    "not.b32 %r4, %r1;": lambda a, b, c: ~a,
    "popc.b32 %r4, %r1;": lambda a, b, c: a.bit_count(),
    "clz.b32 %r4, %r1;": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 %r4, %r1;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "prmt.b32 %r4, %r1, %r2, %r3;": prmt,
    "bfe.u32 %r4, %r1, %r2, %r3;": lambda a, b, c: bfe(a, b, c, False),
    "bfe.s32 %r4, %r1, %r2, %r3;": lambda a, b, c: bfe(a, b, c, True),
    "bfi.b32 %r4, %r1, %r2, %r3, 9;": lambda a, b, c: bfi(a, b, c, 9),
    "lop3.b32 %r4, %r1, %r2, %r3, 0xEA;": lambda a, b, c: lop3(a, b, c, 0xEA),
    "lop3.b32 %r4, %r1, %r2, %r3, 0x1B;": lambda a, b, c: lop3(a, b, c, 0x1B),
    "dp4a.s32.s32 %r4, %r1, %r2, %r3;": lambda a, b, c: (
        c + sum(s(a >> i & 255, 8) * s(b >> i & 255, 8) for i in (0, 8, 16, 24))
    ),
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r4, %r2, %r3, %p1;": lambda a, b, c: b if s(a) < s(b) else c,
    "setp.ge.u32 %p1, %r1, %r2; @!%p1 bra $L; mov.b32 %r4, %r1; bra $E; $L: mov.b32 %r4, %r3; $E:": lambda a, b, c: (
        a if a >= b else c
    ),
    "add.cc.u32 %r5, %r1, %r2; addc.u32 %r4, %r3, 0;": lambda a, b, c: c + (a + b >> 32),
    "sub.cc.u32 %r5, %r1, %r2; subc.u32 %r4, %r3, 0;": lambda a, b, c: c - (a < b),
    "mad.lo.cc.u32 %r5, %r1, %r2, %r3; madc.hi.u32 %r4, %r1, %r2, 0;": lambda a, b, c: a * b + c >> 32,
    "{ .reg .b32 t; xor.b32 t, %r1, %r2; { .reg .b32 t; mov.b32 t, 5; add.u32 %r5, t, 0; } "
    "sub.u32 %r4, t, %r5; }": lambda a, b, c: (a ^ b) - 5,
    "cvt.u16.u32 %rs1, %r1; cvt.u16.u32 %rs2, %r2; mov.b32 %r4, {%rs2, %rs1};": lambda a, b, c: (
        (a & 0xFFFF) << 16 | b & 0xFFFF
    ),
    "mov.b32 {%rs1, %rs2}, %r1; cvt.s32.s16 %r4, %rs2;": lambda a, b, c: s(a >> 16, 16),
    "mov.b32 {%rs1, %rs2}, %r1; mul.wide.s16 %r4, %rs1, %rs2;": lambda a, b, c: s(a & 0xFFFF, 16) * s(a >> 16, 16),
    "cvt.s32.s8 %r4, %r1;": lambda a, b, c: s(a & 255, 8),
    "cvt.sat.s8.s32 %r4, %r1;": lambda a, b, c: max(-128, min(127, s(a))),
    "cvt.s64.s32 %rd5, %r1; shr.s64 %rd5, %rd5, 3; cvt.u32.u64 %r4, %rd5;": lambda a, b, c: s(a) >> 3,
    "mov.b64 %rd5, {%r1, %r2}; shr.u64 %rd5, %rd5, 7; mov.b64 {%r5, %r4}, %rd5;": lambda a, b, c: (b << 32 | a) >> 39,
}


@pytest.mark.parametrize("body", INTEGER)
def test_integer(body: str) -> None:
    for seed, small in ((0, None), (1, None), (2, 40)):
        a, b, c = inputs(seed=seed, small=small)
        if body.startswith(("bfe", "bfi")) and small is None:
            b, c = (b, [v % 70 for v in c]) if body.startswith("bfi") else ([v % 70 for v in b], [v % 70 for v in c])
        assert execute(body, a, b, c) == [INTEGER[body](*x) & M32 for x in zip(a, b, c, strict=True)]


WIDE = {
    "bfe.u64 %rd4, %rd1, 64, 41;": lambda a, b, c: 0,
    "bfe.s64 %rd4, %rd1, 70, 3;": lambda a, b, c: s(a, 64) >> 63,
    "bfe.u64 %rd4, %rd1, 63, 1;": lambda a, b, c: a >> 63,
    "add.cc.u64 %rd5, %rd1, %rd2; addc.u64 %rd4, %rd3, 0;": lambda a, b, c: c + (a + b >> 64),
    "add.cc.u64 %rd5, %rd1, %rd2; addc.cc.u64 %rd6, %rd5, %rd3; addc.u64 %rd4, %rd3, 1;": (
        lambda a, b, c: c + 1 + ((a + b & M64) + c + (a + b >> 64) >> 64)
    ),
    "sub.cc.u64 %rd5, %rd1, %rd2; subc.u64 %rd4, %rd3, 0;": lambda a, b, c: c - (a < b),
    "popc.b64 %r1, %rd1; cvt.u64.u32 %rd4, %r1;": lambda a, b, c: a.bit_count(),
    "brev.b64 %rd4, %rd1;": lambda a, b, c: int(f"{a:064b}"[::-1], 2),
    "add.s64 %rd5, %rd1, %rd2; mad.lo.s64 %rd4, %rd5, %rd2, %rd3;": lambda a, b, c: (a + b) * b + c,
    "mov.b64 {%rs1, %rs2, %rs3, %rs4}, %rd1; mov.b64 %rd4, {%rs4, %rs3, %rs2, %rs1};": (
        lambda a, b, c: int.from_bytes(
            b"".join(a.to_bytes(8, "big")[i : i + 2][::-1] for i in range(0, 8, 2)), "little"
        )
    ),
    "add.s64 %rd4, %rd1, %rd2;": lambda a, b, c: a + b,
    "mul.lo.s64 %rd4, %rd1, %rd2;": lambda a, b, c: a * b,
    "mul.hi.u64 %rd4, %rd1, %rd2;": lambda a, b, c: a * b >> 64,
    "mul.hi.s64 %rd4, %rd1, %rd2;": lambda a, b, c: s(a, 64) * s(b, 64) >> 64,
    "div.s64 %rd4, %rd1, %rd2;": lambda a, b, c: tdiv(s(a, 64), s(b, 64)) if b else M64,
    "rem.u64 %rd4, %rd1, %rd2;": lambda a, b, c: a % b if b else a,
    "cvt.u32.u64 %r1, %rd1; mad.wide.u32 %rd4, %r1, 12345, %rd2;": lambda a, b, c: (a & M32) * 12345 + b,
    "cvt.u32.u64 %r1, %rd1; mad.wide.s32 %rd4, %r1, -7, %rd2;": lambda a, b, c: s(a & M32) * -7 + b,
    "bfe.u64 %rd4, %rd1, 5, 41;": lambda a, b, c: a >> 5 & (1 << 41) - 1,
    "clz.b64 %r1, %rd1; cvt.u64.u32 %rd4, %r1;": lambda a, b, c: 64 - a.bit_length(),
    "setp.gt.s64 %p1, %rd1, %rd2; selp.b64 %rd4, %rd1, %rd3, %p1;": lambda a, b, c: a if s(a, 64) > s(b, 64) else c,
}


@pytest.mark.parametrize("body", WIDE)
def test_wide_integer(body: str) -> None:
    a, b, c = inputs(64)
    assert execute(body, a, b, c, 64) == [WIDE[body](*x) & M64 for x in zip(a, b, c, strict=True)]


@pytest.mark.parametrize("saturate", ["", ".satfinite"], ids=["wraps", "saturates"])
@pytest.mark.parametrize("start", [0x7FFFFFFF, 0x80000000, 5], ids=hex)
@pytest.mark.parametrize("left,right", [(0x7F7F7F7F, 0x7F7F7F7F), (0x80808080, 0x7F7F7F7F)], ids=["up", "down"])
def test_integer_products_beyond_the_accumulator(left: int, right: int, start: int, saturate: str) -> None:
    """32 equal products in every element of a 16 x 8 tile."""
    body = (
        f"mma.sync.aligned.m16n8k32.row.col{saturate}.s32.s8.s8.s32 "
        "{%r4, %r5, %r6, %r7}, {%r1, %r1, %r1, %r1}, {%r2, %r2}, {%r3, %r3, %r3, %r3};"
    )
    exact = s(start) + 32 * s(left & 255, 8) * s(right & 255, 8)
    expected = clamp(exact) if saturate else exact
    assert execute(body, [left] * 32, [right] * 32, [start] * 32) == [expected & M32] * 32
