"""Hand-written PTX around a few instructions, and what Python says they give."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tilewright.aot.emulator import Stats, emulate

M32, M64 = (1 << 32) - 1, (1 << 64) - 1

EDGES = [
    0,
    1,
    2,
    31,
    32,
    33,
    0x7FFFFFFF,
    0x80000000,
    0x80000001,
    0xFFFFFFFF,
    0x3F800000,
    0xBF800000,
    0x7F800000,
    0xFF800000,
    0x00010001,
    0x7FFF8000,
]


def program(body: str, bits: int = 32) -> str:
    """A kernel of one warp: out[i] = body(a[i], b[i], c[i])."""
    size = bits // 8
    if bits == 32:
        load = "ld.global.b32 %r1, [%rd10]; ld.global.b32 %r2, [%rd11]; ld.global.b32 %r3, [%rd12];"
    else:
        load = "ld.global.b64 %rd1, [%rd10]; ld.global.b64 %rd2, [%rd11]; ld.global.b64 %rd3, [%rd12];"
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 .ptr .global .align 1 pa, .param .u64 pb, .param .u64 pc, .param .u64 po, .param .u64 s0,
                  .param .u64 s1)
.reqntid 32
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .b64 %rd<19>;
    mov.u32 %r8, %tid.x;
    mul.wide.u32 %rd9, %r8, {size};
    ld.param.b64 %rd10, [pa]; add.s64 %rd10, %rd10, %rd9;
    ld.param.b64 %rd11, [pb]; add.s64 %rd11, %rd11, %rd9;
    ld.param.b64 %rd12, [pc]; add.s64 %rd12, %rd12, %rd9;
    ld.param.b64 %rd13, [po]; add.s64 %rd13, %rd13, %rd9;
    {load}
    {body}
    st.global.b{bits} [%rd13], {"%r4" if bits == 32 else "%rd4"};
    ret;
}}"""


def execute(body: str, a: Sequence[int], b: Sequence[int], c: Sequence[int], bits: int = 32) -> list[int]:
    """Results as a list of unsigned integers."""
    kind = np.uint32 if bits == 32 else np.uint64
    signed = torch.int32 if bits == 32 else torch.int64
    tensors = [torch.from_numpy(np.array(x, kind).view(np.int32 if bits == 32 else np.int64)) for x in (a, b, c)]
    out = torch.zeros(32, dtype=signed)
    emulate(program(body, bits), (1,), 1, [*tensors, out], arch=90)
    return [int(v) for v in out.numpy().view(kind)]


def inputs(bits: int = 32, seed: int = 0, small: int | None = None) -> tuple[list[int], list[int], list[int]]:
    rng = random.Random(seed)
    edges = EDGES if bits == 32 else [e * 0x100000001 & M64 for e in EDGES]

    def column() -> list[int]:
        values = [rng.choice(edges) if rng.random() < 0.5 else rng.getrandbits(bits) for _ in range(32)]
        return [v % small for v in values] if small else values

    return column(), column(), column()


def s(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> bits - 1 else x


def bits_f(x: int) -> float:
    return struct.unpack("<f", struct.pack("<I", x))[0]


def f_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def two_warps(body: str) -> str:
    """A kernel of two warps with 1 KiB of shared memory at ``s``; %r8 is the thread, %p1 is true in warp 0."""
    return f"""
.version 8.7
.target sm_80
.address_size 64
.shared .align 16 .b8 s[1024];
.visible .entry k(.param .u64 po, .param .u64 s0, .param .u64 s1)
.reqntid 64
{{
    .reg .pred %p<9>; .reg .b32 %r<19>; .reg .b64 %rd<9>;
    mov.u32 %r8, %tid.x;
    setp.lt.u32 %p1, %r8, 32;
    and.b32 %r9, %r8, 31;
    shl.b32 %r10, %r9, 2;
    mov.b32 %r11, s;
    add.s32 %r12, %r11, %r10;
    ld.param.b64 %rd1, [po];
    mul.wide.u32 %rd2, %r8, 4;
    add.s64 %rd1, %rd1, %rd2;
    mov.b32 %r4, 0;
    {body}
    st.global.b32 [%rd1], %r4;
    ret;
}}"""


def shared_run(body: str, **options: Any) -> tuple[torch.Tensor, Stats]:
    out = torch.zeros(64, dtype=torch.int32)
    stats = emulate(two_warps(body), (1,), 2, [out], **options)
    return out, stats
