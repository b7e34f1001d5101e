"""Single integer instructions against Python's integers, on edge values and random words."""

from __future__ import annotations

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


INTEGER = {
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
