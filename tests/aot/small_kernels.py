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
def spilling_kernel(source_ptr, target_ptr, SIZE: tl.constexpr):
    """Holds a [SIZE, SIZE] float32 product in the registers of one warp."""
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    values = tl.load(source_ptr + place)
    tl.store(target_ptr + place, tl.dot(values, values))


@triton.jit
def row_sum_kernel(matrix_ptr, sums_ptr, stride, WIDE: tl.constexpr):
    """sums[row] = the sum of four int8 values. Offsets are 64-bit if WIDE, else they wrap at 2^31."""
    row = tl.program_id(0)
    offset = row.to(tl.int64) * stride if WIDE else row * stride
    values = tl.load(matrix_ptr + offset + tl.arange(0, 4))
    tl.store(sums_ptr + row, tl.sum(values.to(tl.int32)))
