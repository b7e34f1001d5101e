"""From kept values to weights on the device, element by element: four weight tiles from two tiles of values.

v0 and v1 are the first and second kept value of a group of four, m_c is all ones where column c of it is kept:

    w_0 = v0 & m_0        w_1 = (m_0 ? v1 : v0) & m_1        w_2 = (m_3 ? v0 : v1) & m_2        w_3 = v1 & m_3

Two columns are kept, so the first of them is column 1 unless column 0 is kept, and the second is column 2 unless
column 3 is kept. On NVIDIA two 16-bit values or four int8 ones go through a register at a time: a shift brings the bit
to the top of its element, ``prmt`` spreads it, and the rest are six bitwise operations for eight or sixteen weights.
Elsewhere, and in the interpreter, the same in plain Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

# $0-$3: w_0 to w_3; $4: v0, $5: v1, $6: words. Shifts are part of the text: an operand would take a register for each
# element.
_SELECT = """{{
    .reg .b32 m0, m1, m2, m3, t;
    shl.b32 m0, $6, {0};
    shl.b32 m1, $6, {1};
    shl.b32 m2, $6, {2};
    shl.b32 m3, $6, {3};
    prmt.b32 m0, m0, 0, {spread};
    prmt.b32 m1, m1, 0, {spread};
    prmt.b32 m2, m2, 0, {spread};
    prmt.b32 m3, m3, 0, {spread};
    and.b32 $0, $4, m0;
    lop3.b32 t, m0, $5, $4, 0xca;
    and.b32 $1, t, m1;
    lop3.b32 t, m3, $4, $5, 0xca;
    and.b32 $2, t, m2;
    and.b32 $3, $5, m3;
}}"""


def _select(block: int, top: int) -> tl.constexpr:
    """For a block of a step and the topmost bit of an element."""
    shifts = [top - 4 * block - column for column in range(4)]
    return tl.constexpr(_SELECT.format(*shifts, spread="0xbb99" if top == 15 else "0xba98"))


_FLOAT_0, _FLOAT_1, _FLOAT_2, _FLOAT_3 = (_select(block, 15) for block in range(4))
_INT8_0, _INT8_1 = (_select(block, 7) for block in range(2))
# Outputs are written before all inputs are read, so none may share a register with one.
_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r")


@triton.jit
def _where_bit(words, BIT: tl.constexpr, value):
    return tl.where(((words >> BIT) & 1) != 0, value, tl.zeros_like(value))


@triton.jit
def select_columns(first, second, words, BLOCK: tl.constexpr, DTYPE: tl.constexpr, INLINE_PTX: tl.constexpr):
    """The weights of columns 4 i, 4 i + 1, 4 i + 2 and 4 i + 3 of block ``BLOCK`` of a step, each in ``DTYPE``.

    first, second: values, as integers of the width of DTYPE. words: masks, integers of that width. All of one shape.
    """
    if INLINE_PTX:
        if tl.int8 == DTYPE:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                _INT8_0 if BLOCK == 0 else _INT8_1,
                _CONSTRAINTS,
                [first, second, words],
                dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
                is_pure=True,
                pack=4,
            )
        else:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                _FLOAT_0 if BLOCK == 0 else (_FLOAT_1 if BLOCK == 1 else (_FLOAT_2 if BLOCK == 2 else _FLOAT_3)),
                _CONSTRAINTS,
                [first, second, words],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
                is_pure=True,
                pack=2,
            )
    else:
        zeroth = ((words >> (4 * BLOCK)) & 1) != 0
        third = ((words >> (4 * BLOCK + 3)) & 1) != 0
        w0 = _where_bit(words, 4 * BLOCK, first)
        w1 = _where_bit(words, 4 * BLOCK + 1, tl.where(zeroth, second, first))
        w2 = _where_bit(words, 4 * BLOCK + 2, tl.where(third, first, second))
        w3 = _where_bit(words, 4 * BLOCK + 3, second)
    return (
        w0.to(DTYPE, bitcast=True),
        w1.to(DTYPE, bitcast=True),
        w2.to(DTYPE, bitcast=True),
        w3.to(DTYPE, bitcast=True),
    )
