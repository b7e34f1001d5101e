"""The matrix instruction ``mma.sync`` on int4 words, issued by every warp from vectors with an element for each thread.

Elements must lie as threads do, element i in thread i: see ``triton_fragments``. One block of assembly turns a thread's
word into its four registers of operand A, as ``triton.nibbles`` describes, and multiplies: they never leave the block.
Operands are loaded likewise, from a weight in the order of ``fragments`` and from rows of x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.kernels.int4_linear.fragments import TILE_N, UNIT
from tilewright.kernels.triton.registers import split_registers

WHOLE_ROW = tl.constexpr(0)  # value of STEPS_PER_GROUP when one group is the whole row
_TILE_N = tl.constexpr(TILE_N)
_UNIT = tl.constexpr(UNIT)

_REGISTERS = """{{
    .reg .b32 a0, a1, a2, a3, one;
    mov.b32 one, {one};
    shr.u32 a1, {word}, 4;
    shr.u32 a2, {word}, 8;
    shr.u32 a3, {word}, 12;
    lop3.b32 a0, {word}, 0x000f000f, {exponent}, 0xea;
    lop3.b32 a1, a1, 0x000f000f, {exponent}, 0xea;
    lop3.b32 a2, a2, 0x000f000f, {exponent}, 0xea;
    lop3.b32 a3, a3, 0x000f000f, {exponent}, 0xea;
    fma.rn.{pair} a0, a0, one, {upper};
    fma.rn.{pair} a1, a1, one, {lower};
    fma.rn.{pair} a2, a2, one, {upper};
    fma.rn.{pair} a3, a3, one, {lower};
"""
_MMA = """    mma.sync.aligned.m16n8k16.row.col.f32.{type}.{type}.f32
        {{$0, $1, $2, $3}}, {{a0, a1, a2, a3}}, {{$7, $8}}, {{$9, $10, $11, $12}};
"""


def _assembly(type_name: str) -> str:
    """Operands: four sums to write, the word, the offsets of rows g and g + 8, two registers of x, four sums so far."""
    constants = {"f16": ("0x3c003c00", "0x64006400"), "bf16": ("0x3f803f80", "0x43004300")}
    one, exponent = constants[type_name]
    registers = _REGISTERS.format(one=one, exponent=exponent, pair=f"{type_name}x2", word="$4", upper="$5", lower="$6")
    return registers + _MMA.format(type=type_name) + "}"


_FP16, _BF16 = tl.constexpr(_assembly("f16")), tl.constexpr(_assembly("bf16"))


@triton.jit
def offset_pair(words):
    """The lower half of each word, twice."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $1, 0x1010;", "=r,r", [words], tl.int32, is_pure=True, pack=1)


@triton.jit
def scale_of(words, SCALE: tl.constexpr):
    """The float32 scale in the upper half of each word."""
    if tl.bfloat16 == SCALE:
        return (words & -65536).to(tl.float32, bitcast=True)
    else:
        return (words >> 16).to(tl.int16).to(SCALE, bitcast=True).to(tl.float32)


@triton.jit
def multiply_word(word, upper, lower, b0, b1, s0, s1, s2, s3, DTYPE: tl.constexpr):
    """One instruction of each warp: the sums with 16 columns added. All are vectors [threads].

    word: eight nibbles; upper, lower: ``offset_pair`` of rows g and g + 8; b0, b1: four columns of a row of x.
    """
    return tl.inline_asm_elementwise(
        _FP16 if tl.float16 == DTYPE else _BF16,
        "=f,=f,=f,=f,r,r,r,r,r,f,f,f,f",
        [word, upper, lower, b0, b1, s0, s1, s2, s3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def load_step(words, groups, step, UNITS: tl.constexpr, STEPS_PER_GROUP: tl.constexpr):
    """Words of one step, [threads, 4] for each of its units, and those of its group [threads, 2]."""
    here = words + (step * (UNITS * 128))[:, None]
    w0 = tl.load(here, eviction_policy="evict_first")
    w1 = w0
    if UNITS == 2:
        w1 = tl.load(here + 128, eviction_policy="evict_first")
    if STEPS_PER_GROUP == WHOLE_ROW:
        group = tl.load(groups)
    else:
        group = tl.load(groups + (step // STEPS_PER_GROUP * _TILE_N)[:, None])
    return w0, w1, group


@triton.jit
def load_x(x_row, unit):
    """A thread's 16 columns of a unit, from the row that it points to: eight registers of operand B."""
    place = x_row[:, None] + (unit * (_UNIT // 2))[:, None] + tl.arange(0, 4)[None, :]
    b0, b1, b2, b3 = split_registers(tl.load(place))
    b4, b5, b6, b7 = split_registers(tl.load(place + 4))
    return b0, b1, b2, b3, b4, b5, b6, b7
