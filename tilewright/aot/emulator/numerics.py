"""Bit patterns <-> numbers for PTX types, and conversions between them.

Registers hold unsigned words (bool for predicates). ``decode(raw, type)`` gives numpy numbers; ``encode(number, type)`` the
words again. A packed type (f16x2, bf16x2) decodes to an array twice as long, so element-wise code needs no special case.
"""

# mypy: ignore-errors
# ruff: noqa: D102, D103, E501, B007
from __future__ import annotations

import numpy as np

U16, U32, U64 = np.uint16, np.uint32, np.uint64
WORD = {16: U16, 32: U32, 64: U64, "pred": np.bool_}
_NATIVE = {
    "u16": U16,
    "s16": np.int16,
    "b16": U16,
    "u32": U32,
    "s32": np.int32,
    "b32": U32,
    "u64": U64,
    "s64": np.int64,
    "b64": U64,
    "f32": np.float32,
    "f64": np.float64,
    "tf32": np.float32,
}
_HALF = {"f16": U16, "f16x2": U32}
_BRAIN = {"bf16": U16, "bf16x2": U32}
FLOATS = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "tf32"}


def bits_of(kind: str) -> int:
    """Width of a scalar PTX type in bits (packed types are 32)."""
    if kind.endswith("x2"):
        return 32
    return 32 if kind == "tf32" else int(kind.lstrip("bfsu"))


def bf16_to_f32(raw: np.ndarray) -> np.ndarray:
    return (raw.astype(U32) << U32(16)).view(np.float32)


def f32_to_bf16(value: np.ndarray, rounding: str = "rn") -> np.ndarray:
    word = np.ascontiguousarray(value, np.float32).view(U32)
    if rounding == "rn":
        kept = (word + U32(0x7FFF) + ((word >> U32(16)) & U32(1))) >> U32(16)
    else:
        kept = word >> U32(16)
    return np.where((word & U32(0x7FFFFFFF)) > U32(0x7F800000), U32(0x7FFF), kept).astype(U16)


def f32_to_f16_toward_zero(value: np.ndarray) -> np.ndarray:
    """Float16 words of float32 numbers cut toward zero (too large a number becomes the largest finite one)."""
    word = value.astype(np.float16).view(U16)
    beyond = np.abs(word.view(np.float16).astype(np.float64)) > np.abs(value.astype(np.float64))
    return word - beyond.astype(U16)


def tf32(word: np.ndarray, away: bool = False) -> np.ndarray:
    """Float32 bits cut to tf32's 10 mantissa bits; ``away`` rounds to nearest, ties away from zero."""
    if away:
        finite = (word & U32(0x7F800000)) != U32(0x7F800000)
        word = np.where(finite, word + U32(0x1000), word)
    return word & U32(0xFFFFE000)


def decode(raw: np.ndarray, kind: str) -> np.ndarray:
    """Numbers held by ``raw``; 16-bit floats come as float32 (exact)."""
    if kind in _NATIVE:
        return raw.view(_NATIVE[kind])
    if kind in _HALF:
        return raw.view(np.float16).astype(np.float32)
    if kind in _BRAIN:
        return bf16_to_f32(raw.view(U16))
    raise KeyError(kind)


def encode(value: np.ndarray, kind: str) -> np.ndarray:
    """Words holding ``value`` rounded to nearest even."""
    if kind in _NATIVE:
        return np.ascontiguousarray(value, _NATIVE[kind]).view(WORD[bits_of(kind)])
    if kind in _HALF:
        return np.ascontiguousarray(value, np.float16).view(_HALF[kind])
    if kind in _BRAIN:
        return f32_to_bf16(value).view(_BRAIN[kind])
    raise KeyError(kind)


def flush(value: np.ndarray) -> np.ndarray:
    """Float32 subnormals replaced by zeros of the same sign (``.ftz``)."""
    tiny = np.abs(value) < np.float32(1.1754943508222875e-38)
    return np.where(tiny, np.copysign(np.float32(0), value), value)


def limits(kind: str) -> tuple[int, int]:
    width = bits_of(kind)
    return (-(1 << width - 1), (1 << width - 1) - 1) if kind[0] == "s" else (0, (1 << width) - 1)


def low_integer(raw: np.ndarray, kind: str) -> np.ndarray:
    """The low bits of a (possibly wider) register as the signed or unsigned integer type ``kind``, in int64 or uint64."""
    width = bits_of(kind)
    word = raw.astype(U64)
    if width < 64:
        word = word & U64((1 << width) - 1)
    if kind[0] != "s":
        return word
    shift = np.int64(64 - width)
    return (word.view(np.int64) << shift) >> shift


def to_integer(value: np.ndarray, kind: str, rounding: str) -> np.ndarray:
    """Float -> integer as ``cvt`` does: round, clamp to the type's range, NaN becomes 0. Gives int64 or uint64."""
    rounder = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
    whole = rounder(value.astype(np.float64))
    low, high = limits(kind)
    whole = np.where(np.isnan(whole), 0.0, whole)
    target = np.int64 if kind[0] == "s" else U64
    inside = np.clip(whole, float(low), float(high))
    top = inside >= float(high)
    return np.where(top, target(high), np.where(top, 0.0, inside).astype(target))
