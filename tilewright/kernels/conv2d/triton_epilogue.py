"""What the convolution kernels share on the device: positions of pixels, products, and the end of a tile.

Operands are float, int8, or uint8 that stands for value + 128. ``finish_conv_tile`` is the device's side of what the
references do after the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.kernels.triton.common import activate
from tilewright.kernels.triton.rounding import requantize, store_quantized


@triton.jit
def pixel(m, P, Q):
    """(image, row, column) of pixels ``m`` of the result."""
    return m // (P * Q), m // Q % P, m % Q


@triton.jit
def load_signed(pointers, mask, zero, SHIFTED: tl.constexpr):
    """Values at ``pointers``, 0 where ``mask`` is false, or ``zero`` if SHIFTED; offset uint8 become int8."""
    x = tl.load(pointers, mask=mask, other=0)
    # Not by ``other``: Triton 3.7 fills a packed register with 0xffffff80 instead of 0x80808080 (seen in PTX).
    if pointers.dtype.element_ty == tl.uint8:
        x = (x ^ 128).to(tl.int8, bitcast=True)
        x = tl.where(mask, x, tl.full((), zero, tl.int8) if SHIFTED else 0)
    elif SHIFTED:
        x = tl.where(mask, x, tl.full((), zero, tl.int8))
    return x


@triton.jit
def multiply(x, w, acc, INTEGER: tl.constexpr, PRECISION: tl.constexpr):
    """acc [BM, BN] + x [BM, BK] times w [BN, BK] transposed. PRECISION: of float32 operands, "ieee" or "tf32"."""
    if INTEGER:
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@triton.jit
def finish_conv_tile(
    acc,
    out_ptr,
    w_scale_ptr,
    w_sum_ptr,
    bias_ptr,
    residual_ptr,
    x_scale,
    x_zero,
    residual_scale,
    residual_zero,
    out_scale,
    out_zero,
    negative_slope,
    row,
    column,
    row_mask,
    column_mask,
    N,
    ACTIVATION: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """out[row, column] = activation((acc - x_zero * w_sum[column]) * (x_scale * w_scale[column]) + bias[column] +
    (residual[row, column] - residual_zero) * residual_scale), in float32, then divided by out_scale and rounded, plus
    out_zero, if QUANTIZE, and cast.

    acc: int32 or float32 tile. row [BM, 1], column [1, BN] int32. out, residual: contiguous [., N]; w_scale_ptr,
    w_sum_ptr, bias_ptr, residual_ptr may be None. Zero points are whole numbers, as float32. Nothing outside the masks
    is read or written.
    """
    inside = row_mask & column_mask
    offset = row.to(tl.int64) * N + column
    if w_sum_ptr is not None:
        acc -= tl.full((), x_zero, tl.int32) * tl.load(w_sum_ptr + column, mask=column_mask, other=0)
    y = acc.to(tl.float32)
    if w_scale_ptr is not None:
        y *= x_scale * tl.load(w_scale_ptr + column, mask=column_mask, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offset, mask=inside, other=0)
        values = residual.to(tl.float32)
        if residual_ptr.dtype.element_ty == tl.uint8:
            values -= 128.0
        if residual_ptr.dtype.element_ty.is_int():
            values -= residual_zero
        y += values * residual_scale
    y = activate(y, ACTIVATION, negative_slope)
    if QUANTIZE:
        store_quantized(out_ptr + offset, requantize(y, out_scale, out_zero), inside)
    else:
        tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=inside)
