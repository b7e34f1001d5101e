"""The sparse matrix instruction ``mma.sp``, issued by every warp from vectors with an element for each thread.

Elements must lie as threads do, element i in thread i: see ``triton_fragments``. Operands are loaded likewise, from a
weight in the order of ``fragments`` and from rows of x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.kernels.sparse24_linear.fragments import UNIT
from tilewright.kernels.triton.registers import split_registers

_UNIT = tl.constexpr(UNIT)

# $0-$3: sums, $4-$7: A, $8-$11: B, $12-$15: sums so far, $16: metadata, of the pair of lanes that the selector names.
_MMA = (
    "mma.sp::ordered_metadata.sync.aligned.SHAPE {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9, $10, $11}, "
    "{$12, $13, $14, $15}, $16, SELECTOR;"
)


def _mma(shape: str, selector: int) -> tl.constexpr:
    return tl.constexpr(_MMA.replace("SHAPE", shape).replace("SELECTOR", hex(selector)))


_FP16_0, _FP16_1 = (_mma("m16n8k32.row.col.f32.f16.f16.f32", selector) for selector in (0, 1))
_BF16_0, _BF16_1 = (_mma("m16n8k32.row.col.f32.bf16.bf16.f32", selector) for selector in (0, 1))
_INT8_0 = _mma("m16n8k64.row.col.s32.s8.s8.s32", 0)
_FLOAT_CONSTRAINTS = tl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r")
_INT_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r")

# $0: 0 so far, in both halves, $1: two numbers, $2: the same as $0 before.
_FP16_TIMES_0 = tl.constexpr("{ .reg .b32 none; mov.b32 none, 0; fma.rn.f16x2 $0, $1, none, $2; }")
_BF16_TIMES_0 = tl.constexpr("{ .reg .b32 none; mov.b32 none, 0; fma.rn.bf16x2 $0, $1, none, $2; }")


@triton.jit
def multiply_step(a0, a1, a2, a3, b0, b1, b2, b3, meta, s0, s1, s2, s3, STEP: tl.constexpr, DTYPE: tl.constexpr):
    """One instruction of each warp: the sums with a step of K added. All are vectors [threads]."""
    if tl.int8 == DTYPE:
        return tl.inline_asm_elementwise(
            _INT8_0,
            _INT_CONSTRAINTS,
            [a0, a1, a2, a3, b0, b1, b2, b3, s0, s1, s2, s3, meta],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        FP16: tl.constexpr = _FP16_0 if STEP % 2 == 0 else _FP16_1
        BF16: tl.constexpr = _BF16_0 if STEP % 2 == 0 else _BF16_1
        return tl.inline_asm_elementwise(
            FP16 if tl.float16 == DTYPE else BF16,
            _FLOAT_CONSTRAINTS,
            [a0, a1, a2, a3, b0, b1, b2, b3, s0, s1, s2, s3, meta],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def watch(words, zeros, DTYPE: tl.constexpr):
    """``zeros`` (packed pairs) plus 0 times each number in ``words``: NaN from the first that is not finite."""
    return tl.inline_asm_elementwise(
        _FP16_TIMES_0 if tl.float16 == DTYPE else _BF16_TIMES_0,
        "=r,r,r",
        [words, zeros],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def poison(zeros, THREADS: tl.constexpr):
    """What to add to a thread's sums of rows 2 t and 2 t + 1: 0, or NaN. ``zeros``: of lanes 4 g + t, which have row
    g.
    """
    bad = tl.where((zeros & 0x7FFF7FFF) != 0, float("nan"), 0.0)
    rows = tl.sum(tl.reshape(bad, (THREADS // 32, 8, 4)), axis=2)
    pairs = tl.reshape(rows, (THREADS // 32, 1, 4, 2))
    first, second = tl.split(tl.broadcast_to(pairs, (THREADS // 32, 8, 4, 2)))
    return tl.reshape(first, (THREADS,)), tl.reshape(second, (THREADS,))


@triton.jit
def x_registers(x_row, unit, lane4, STEP: tl.constexpr, IS_INT8: tl.constexpr):
    """Operand B of one step: four words of the row that each thread points to."""
    if IS_INT8:
        words = x_row[:, None] + unit * (_UNIT // 4) + STEP * 16 + lane4[:, None] * 4 + tl.arange(0, 4)[None, :]
        return split_registers(tl.load(words))
    else:
        words = x_row + unit * (_UNIT // 2) + STEP * 16 + lane4
        return tl.load(words), tl.load(words + 4), tl.load(words + 8), tl.load(words + 12)


@triton.jit
def load_unit(values, meta, unit, STEPS: tl.constexpr):
    """The weight's registers of one unit: metadata, and [threads, 4] for each step."""
    here = values + unit * (STEPS * 128)
    m0 = tl.load(meta + unit * 64)
    m1 = tl.load(meta + unit * 64 + 32)
    a0 = tl.load(here)
    a1 = tl.load(here + 128)
    if STEPS == 4:
        return m0, m1, a0, a1, tl.load(here + 256), tl.load(here + 384)
    else:
        return m0, m1, a0, a1, a0, a1
