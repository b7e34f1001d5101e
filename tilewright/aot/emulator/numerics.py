"""Bit patterns <-> numbers for PTX types, and the roundings between them.

Registers hold unsigned words (bool for predicates). ``decode(raw, kind)`` gives numpy numbers, ``encode(number, kind)``
the words again. A packed type (f16x2, s16x2, ...) decodes to an array twice as long, low half first, so element-wise
code needs no special case.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tilewright.aot.emulator.program import Width

Array = npt.NDArray[Any]
U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
WORD: dict[Width, Any] = {8: U8, 16: U16, 32: U32, 64: U64, "pred": np.bool_}
#: Types that are numpy's own.
NATIVE: dict[str, Any] = {
    **{f"{sign}{bits}": WORD[bits] for sign in "ub" for bits in (16, 32, 64)},
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "u16x2": U16,
    "s16x2": np.int16,
    "f32": np.float32,
    "f64": np.float64,
    "tf32": np.float32,
}
_HALF = {"f16": U16, "f16x2": U32}
_BRAIN = {"bf16": U16, "bf16x2": U32}
_TINY = {"f32": 2.0**-126, "bf16": 2.0**-126, "bf16x2": 2.0**-126, "f16": 2.0**-14, "f16x2": 2.0**-14}
#: Largest finite number of each type.
LARGEST = {
    "f16": 65504.0,
    "f16x2": 65504.0,
    "bf16": 2.0**127 * (2 - 2.0**-7),
    "bf16x2": 2.0**127 * (2 - 2.0**-7),
    "tf32": 2.0**127 * (2 - 2.0**-10),
}
FLOATS = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "tf32"}
_FLOAT8_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
#: Float64 values of every code of the two 8-bit floats.
FLOAT8: dict[str, Array] = {
    kind: torch.arange(256, dtype=torch.uint8).view(dtype).double().numpy() for kind, dtype in _FLOAT8_DTYPES.items()
}
#: Two of them in 16 bits, as ``cvt`` takes them.
FLOAT8_PAIRS = {f"{kind}x2": kind for kind in FLOAT8}
_SIGN_EXPONENT = U32(0x7F800000)


def bits_of(kind: str) -> int:
    """Width of a PTX type in bits (32 for a packed one)."""
    if kind in FLOAT8_PAIRS:
        return 16
    return 32 if kind.endswith("x2") or kind == "tf32" else int(kind.lstrip("bfsu"))


def to_native(value: Array, dtype: Any, rounding: str = "rn") -> Array:
    """The ``dtype`` nearest to ``value`` ("rn"), or next to it toward zero ("rz"), down ("rm") or up ("rp")."""
    near = np.asarray(value, dtype)
    if rounding == "rn" or value.dtype == dtype:
        return near
    wide = near.astype(np.float64)
    if rounding == "rz":
        beyond, toward = np.abs(wide) > np.abs(value), 0.0
    elif rounding == "rm":
        beyond, toward = wide > value, -np.inf
    else:
        beyond, toward = wide < value, np.inf
    return np.where(beyond, np.nextafter(near, dtype(toward)), near)


def round_to_odd(value: Array) -> Array:
    """Float32 words of float64 numbers, inexact ones with an odd last bit: rounding those once more is then exact.

    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd" (2008).
    """
    near = value.astype(np.float32)
    wide, word = near.astype(np.float64), near.view(U32)
    adjust = (wide != value) & ((word & U32(1)) == 0) & ~np.isnan(value)
    step = np.where(np.abs(wide) > np.abs(value), U32(0xFFFFFFFF), U32(1))
    return np.where(adjust, word + step, word)


def to_bf16(value: Array, rounding: str = "rn") -> Array:
    """Bfloat16 words of float32 or float64 numbers, nearest even ("rn") or toward zero ("rz")."""
    word = round_to_odd(value) if value.dtype == np.float64 else np.ascontiguousarray(value, np.float32).view(U32)
    kept = word >> U32(16) if rounding == "rz" else (word + U32(0x7FFF) + ((word >> U32(16)) & U32(1))) >> U32(16)
    return np.where((word & U32(0x7FFFFFFF)) > _SIGN_EXPONENT, U32(0x7FFF), kept).astype(U16)


def to_tf32(word: Array, rounding: str = "rz") -> Array:
    """Float32 words cut to tf32's 10 mantissa bits: toward zero, nearest even ("rn") or nearest away ("rna")."""
    nan = (word & U32(0x7FFFFFFF)) > _SIGN_EXPONENT
    if rounding != "rz":
        half = U32(0x1000) if rounding == "rna" else U32(0xFFF) + ((word >> U32(13)) & U32(1))
        word = np.where((word & _SIGN_EXPONENT) != _SIGN_EXPONENT, word + half, word)
    return np.where(nan, word | U32(0x400000), word) & U32(0xFFFFE000)


def decode(raw: Array, kind: str) -> Array:
    """Numbers held by ``raw``; 16-bit floats come as float32, which is exact."""
    if kind in NATIVE:
        return raw.view(NATIVE[kind])
    if kind in _HALF:
        return raw.view(np.float16).astype(np.float32)
    if kind in _BRAIN:
        return (raw.view(U16).astype(U32) << U32(16)).view(np.float32)
    if kind in FLOAT8_PAIRS:
        return FLOAT8[FLOAT8_PAIRS[kind]][raw.view(U8)].astype(np.float32)
    raise KeyError(kind)


def encode(value: Array, kind: str, rounding: str = "rn") -> Array:
    """Words holding ``value``, rounded once."""
    if kind == "f32" and rounding != "rn":
        value = to_native(value, np.float32, rounding)
    if kind in NATIVE:
        return np.ascontiguousarray(value, NATIVE[kind]).view(WORD[bits_of(kind)])
    if kind in _HALF:
        return np.ascontiguousarray(to_native(value, np.float16, rounding)).view(_HALF[kind])
    if kind in _BRAIN:
        return to_bf16(value, rounding).view(_BRAIN[kind])
    if kind in FLOAT8_PAIRS:
        return to_float8(value, FLOAT8_PAIRS[kind]).view(U16)
    raise KeyError(kind)


def odd_sum(product: Array, addend: Array) -> Array:
    """Float64 sum whose later rounding to float32 or less is as if the sum had been exact.

    Wherever the rounded sum might be a tie or a number of the narrow type, its last bit is made to say that something
    was lost (``round_to_odd``'s idea; the loss is that of Knuth's TwoSum).
    """
    total = product + addend
    doubtful = (total.view(U64) & U64(0x0FFFFFFF)) == 0
    if not doubtful.any():
        return total
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    adjust = doubtful & (lost != 0) & np.isfinite(total)
    if not adjust.any():
        return total
    step = np.where((lost > 0) == (total > 0), np.int64(1), np.int64(-1))
    return np.where(adjust, total.view(np.int64) + step, total.view(np.int64)).view(np.float64)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32 numbers in float64, such that rounding it to float32 or less is rounding once."""
    return odd_sum(a.astype(np.float64) * b, c.astype(np.float64))


def flush(value: Array, kind: str = "f32") -> Array:
    """Subnormals of ``kind`` replaced by zeros of the same sign (``.ftz``)."""
    return np.where(np.abs(value) < _TINY[kind], np.copysign(np.float32(0), value), value)


def limits(kind: str) -> tuple[int, int]:
    """Least and largest value of an integer type."""
    width = bits_of(kind)
    return (-(1 << width - 1), (1 << width - 1) - 1) if kind[0] == "s" else (0, (1 << width) - 1)


def low_integer(raw: Array, kind: str) -> Array:
    """The low bits of a possibly wider register as the integer type ``kind``, in int64 or uint64."""
    width = bits_of(kind)
    word = raw.astype(U64)
    if width < 64:
        word = word & U64((1 << width) - 1)
    if kind[0] != "s":
        return word
    shift = np.int64(64 - width)
    return (word.view(np.int64) << shift) >> shift


_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_whole(value: Array, rounding: str) -> Array:
    """Floats rounded to whole numbers as one of rni, rzi, rmi, rpi says."""
    rounded: Array = _WHOLE[rounding](value)
    return rounded


def to_integer(value: Array, kind: str, rounding: str) -> Array:
    """Float -> integer as ``cvt`` does: round, clamp to the type's range. Gives int64 or uint64.

    NaN becomes 0, but the lone top bit where source or destination has 64 bits (PTX ISA, "cvt", integer notes).
    """
    whole = to_whole(value.astype(np.float64), rounding)
    low, high = limits(kind)
    target = np.int64 if kind[0] == "s" else U64
    wide = value.dtype == np.float64 or bits_of(kind) == 64
    missing = (low if kind[0] == "s" else high // 2 + 1) if wide else 0
    inside = np.clip(np.where(np.isnan(whole), 0.0, whole), float(low), float(high))
    top = inside >= float(high)
    number = np.where(top, target(high), np.where(top, 0.0, inside).astype(target))
    return np.where(np.isnan(whole), target(missing), number)


def to_float8(value: Array, kind: str) -> Array:
    """Codes (uint8) nearest to float32 numbers, ties to even; what is too large becomes the largest finite number."""
    dtype = _FLOAT8_DTYPES[kind]
    largest = torch.finfo(dtype).max
    number = torch.from_numpy(np.clip(value, -largest, largest)).to(dtype)
    return np.where(np.isnan(value), U8(0x7F), number.view(torch.uint8).numpy())
