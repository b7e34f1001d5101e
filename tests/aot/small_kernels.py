"""Kernels small enough that what they compile to can be said in advance."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_kernel(source_ptr, target_ptr, count, stride, BLOCK: tl.constexpr):
    """target[i] = source[i * stride] for i < count; an absent target is not written."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source_ptr + place * stride, mask=place < count)
    if target_ptr is not None:
        tl.store(target_ptr + place, values, mask=place < count)


@triton.jit
def scale_kernel(source_ptr, target_ptr, count, BLOCK: tl.constexpr, SCALE: tl.constexpr = 2.0):
    """target[i] = source[i] * SCALE for i < count."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + place, tl.load(source_ptr + place, mask=place < count) * SCALE, mask=place < count)


@triton.jit(do_not_specialize=["rows"])
def arguments_kernel(pointer, rows, number, fraction, flag, SIZE: tl.constexpr):
    """Takes one argument of every type that a launch may have, and writes one value."""
    tl.store(pointer, rows + number + fraction + flag + SIZE)


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SUM: tl.constexpr):
    """c = a @ b^T for row-major a, b [BLOCK, K] and c [BLOCK, BLOCK]."""
    row = tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK, BLOCK), SUM)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + row[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + row[:, None] * K + start + k[None, :])
        total = tl.dot(a, tl.trans(b), total, out_dtype=SUM)
    tl.store(c_ptr + row[:, None] * BLOCK + row[None, :], total)


@triton.jit
def share_kernel(source_ptr, target_ptr, SIZE: tl.constexpr):
    """target = source / sum(source), all of it in the registers of one program."""
    place = tl.arange(0, SIZE)
    values = tl.load(source_ptr + place)
    tl.store(target_ptr + place, values / tl.sum(values))


@triton.jit
def row_sum_kernel(matrix_ptr, sums_ptr, stride, WIDE: tl.constexpr):
    """sums[row] = the sum of four int8 values. Offsets are 64-bit if WIDE, else they wrap at 2^31."""
    row = tl.program_id(0)
    offset = row.to(tl.int64) * stride if WIDE else row * stride
    values = tl.load(matrix_ptr + offset + tl.arange(0, 4))
    tl.store(sums_ptr + row, tl.sum(values.to(tl.int32)))


@triton.jit
def first_of_four_kernel(source_ptr, target_ptr, ROWS: tl.constexpr):
    """target[row] = source[row, 0] four times for int32 [ROWS, 4], if the four values of a row are packed together."""
    place = tl.arange(0, ROWS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    first = tl.inline_asm_elementwise(
        "mov.b32 $0, $4; mov.b32 $1, $4; mov.b32 $2, $4; mov.b32 $3, $4;",
        "=&r,=&r,=&r,=&r,r,r,r,r",
        [tl.load(source_ptr + place)],
        dtype=tl.int32,
        is_pure=True,
        pack=4,
    )
    tl.store(target_ptr + place, first)
