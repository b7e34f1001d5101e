"""A nibble of each word to a number u - z, on the device, without a conversion instruction.

Conversions from integer to float run at a fraction of the rate of other instructions. But u in the low mantissa bits
of 2^p, where one unit in the last place is 1, *is* the number 2^p + u: p = 10 in float16 (0x6400), 7 in bfloat16
(0x4300). Adding -(2^p + z), whose bits are known as well, leaves u - z. Every step is exact, so both ways below give
equal bits:

    INLINE_PTX  the two words of a register at a time: shift, mask-and-or, multiply-add (int8: four words at a time)
    otherwise   plain Triton, an element at a time: AMD and the interpreter

``centred_nibble`` is u - 8, which takes no operand but the words. The compiler then loads them in the very layout in
which the matrix instruction takes its left operand: it moves a change of layout to before elementwise steps, but not to
before an operand that was broadcast, such as a zero point for each row. With one, every tile of widened weights goes
through shared memory and back (Triton 3.6 and 3.7).
"""

from __future__ import annotations

import triton
import triton.language as tl

# $0: two numbers, $1: two words, $2: -(2^p + z) twice, $3: how far to shift.
# sm_80 has no addition of bf16, only multiply-add.
_TO_FLOAT = """{{
    .reg .b32 bits, one;
    shr.u32 bits, $1, $3;
    lop3.b32 bits, bits, 0x000f000f, {exponent}, 0xea;
    mov.b32 one, {one};
    fma.rn.{pair} $0, bits, one, $2;
}}"""
_TO_FLOAT16 = tl.constexpr(_TO_FLOAT.format(exponent="0x64006400", one="0x3c003c00", pair="f16x2"))
_TO_BFLOAT16 = tl.constexpr(_TO_FLOAT.format(exponent="0x43004300", one="0x3f803f80", pair="bf16x2"))

# The same without an operand for the offset: $0 numbers, $1 (and $2) words, last how far to shift.
_TO_CENTRED_FLOAT = """{{
    .reg .b32 bits, one, offset;
    shr.u32 bits, $1, $2;
    lop3.b32 bits, bits, 0x000f000f, {exponent}, 0xea;
    mov.b32 one, {one};
    mov.b32 offset, {offset};
    fma.rn.{pair} $0, bits, one, offset;
}}"""
_TO_CENTRED_FLOAT16 = tl.constexpr(
    _TO_CENTRED_FLOAT.format(exponent="0x64006400", one="0x3c003c00", offset="0xe408e408", pair="f16x2")
)
_TO_CENTRED_BFLOAT16 = tl.constexpr(
    _TO_CENTRED_FLOAT.format(exponent="0x43004300", one="0x3f803f80", offset="0xc308c308", pair="bf16x2")
)
# With 128 added to u, the subtraction borrows nothing from the next byte.
_TO_CENTRED_INT8 = tl.constexpr("""{
    .reg .b32 first, second;
    shr.u32 first, $1, $3;
    shr.u32 second, $2, $3;
    prmt.b32 first, first, second, 0x6420;
    lop3.b32 first, first, 0x0f0f0f0f, 0x80808080, 0xea;
    sub.u32 first, first, 0x08080808;
    xor.b32 $0, first, 0x80808080;
}""")


@triton.jit
def offset_of(zero, DTYPE: tl.constexpr):
    """What ``nibble_number`` wants for zero points uint8 of any shape: -(2^p + z)."""
    if tl.float16 == DTYPE:
        return (zero.to(tl.uint16) | 0xE400).to(tl.float16, bitcast=True)
    else:
        return (zero.to(tl.uint16) | 0xC300).to(tl.bfloat16, bitcast=True)


@triton.jit
def nibble_number(words, INDEX: tl.constexpr, offset, DTYPE: tl.constexpr, INLINE_PTX: tl.constexpr):
    """u - z in ``DTYPE``, float16 or bfloat16, for nibble ``INDEX`` of each int16 word; ``offset`` is ``offset_of(z)``
    for each word.
    """
    if INLINE_PTX and tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            _TO_FLOAT16, "=r,r,r,r,r", [words, offset, INDEX * 4], dtype=tl.float16, is_pure=True, pack=2
        )
    elif INLINE_PTX:
        return tl.inline_asm_elementwise(
            _TO_BFLOAT16, "=r,r,r,r,r", [words, offset, INDEX * 4], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    nibble = (words >> (INDEX * 4)) & 15
    if tl.float16 == DTYPE:
        return (nibble | 0x6400).to(tl.float16, bitcast=True) + offset
    else:
        return (nibble | 0x4300).to(tl.bfloat16, bitcast=True) + offset


@triton.jit
def centred_nibble(words, INDEX: tl.constexpr, DTYPE: tl.constexpr, INLINE_PTX: tl.constexpr):
    """u - 8 in ``DTYPE``, float16, bfloat16 or int8, for nibble ``INDEX`` of each int16 word."""
    if INLINE_PTX and tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            _TO_CENTRED_FLOAT16, "=r,r,r,r", [words, INDEX * 4], dtype=tl.float16, is_pure=True, pack=2
        )
    elif INLINE_PTX and tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            _TO_CENTRED_BFLOAT16, "=r,r,r,r", [words, INDEX * 4], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif INLINE_PTX:
        return tl.inline_asm_elementwise(
            _TO_CENTRED_INT8, "=r,r,r,r,r,r,r", [words, INDEX * 4], dtype=tl.int8, is_pure=True, pack=4
        )
    nibble = (words >> (INDEX * 4)) & 15
    if tl.float16 == DTYPE:
        return (nibble | 0x6400).to(tl.float16, bitcast=True) - tl.full((1, 1), 1032.0, tl.float16)
    elif tl.bfloat16 == DTYPE:
        return (nibble | 0x4300).to(tl.bfloat16, bitcast=True) - tl.full((1, 1), 136.0, tl.bfloat16)
    else:
        return (nibble - 8).to(tl.int8)
