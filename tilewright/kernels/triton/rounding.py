"""Rounding float32 to integers on the device, as IEEE division and round-half-even would."""

from __future__ import annotations

import triton
import triton.language as tl

#: Whether a multiply-add is rounded once: in Triton's interpreter it is rounded twice.
_FUSED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def quotient(y, divisor):
    """float32 y / divisor, rounded once, for divisors in (0, 2^121) that serve many y: without a division for each.

    The reciprocal of the divisor gives a first quotient, and the exact remainder of each improves it, twice (Markstein,
    "Computation of elementary functions on the IBM RISC System/6000 processor", 1990). NaN where y or divisor is not
    finite.
    """
    if _FUSED:
        # Powers of two change no digit, and keep the reciprocal of a tiny divisor finite.
        up = tl.where(divisor < 2.0**-100, 2.0**100, 1.0)
        y, divisor = y * up, divisor * up
        inverse = tl.math.div_rn(1.0, divisor)
        q = y * inverse
        q = tl.fma(tl.fma(-q, divisor, y), inverse, q)
        return tl.fma(tl.fma(-q, divisor, y), inverse, q)
    else:
        return tl.math.div_rn(y, divisor + tl.zeros_like(y))


@triton.jit
def nearest_byte(y):
    """int32 whose lowest byte is float32 ``y`` rounded to the nearest integer, half to even, for |y| < 2^21.

    Adding 1.5 * 2^23 leaves no bits for a fraction: the addition itself rounds, and the integer is what its last bits
    hold.
    """
    return (y + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def requantize(y, scale, zero):
    """clamp(round_half_even(y / scale) + zero, -127, 127) of float32 ``y`` in the lowest byte of int32; NaN becomes
    zero. zero: a whole number, as float32.
    """
    low = tl.maximum((-127.0 - zero) * scale, -3.0e38)  # infinite y have a quotient, too
    high = tl.minimum((127.0 - zero) * scale, 3.0e38)
    steps = nearest_byte(quotient(tl.minimum(tl.maximum(y, low), high), scale))
    return tl.where(y == y, steps, 0) + tl.full((), zero, tl.int32)


@triton.jit
def store_quantized(pointers, steps, mask):
    """Write the lowest bytes of int32 to int8, or to uint8 as value + 128."""
    if pointers.dtype.element_ty == tl.uint8:
        steps += 128
    tl.store(pointers, steps.to(pointers.dtype.element_ty), mask=mask)
