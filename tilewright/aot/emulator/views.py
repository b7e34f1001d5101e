"""Byte arrays seen as arrays of wider words, so that one index moves a whole element."""

from __future__ import annotations

import numpy as np

from tilewright.aot.emulator.errors import Misaligned
from tilewright.aot.emulator.numerics import WORD, Array


def rows(buffer: Array, size: int) -> Array:
    """View a flat uint8 buffer as [count, words] of the widest word for ``size``-byte elements (a tail is cut)."""
    usable = buffer[: len(buffer) // size * size]
    return usable.view(WORD[min(size, 8) * 8]).reshape(-1, max(size // 8, 1))


def as_rows(data: Array, size: int) -> Array:
    """View [lanes, size] bytes as [lanes, words]."""
    return np.ascontiguousarray(data).view(WORD[min(size, 8) * 8])


def repeated(byte: Array | int, size: int) -> Array:
    """The word, or the column of words, each of whose bytes is ``byte``."""
    word = WORD[min(size, 8) * 8]
    ones = word(int.from_bytes(b"\1" * min(size, 8), "little"))
    if isinstance(byte, int):
        return np.asarray(word(byte) * ones)
    return (byte.astype(word) * ones)[:, None]


def check_alignment(address: Array, size: int, space: str) -> None:
    """Raise Misaligned where an address is not a multiple of ``size`` (a power of two)."""
    wrong = (address & address.dtype.type(size - 1)) != 0
    if wrong.any():
        lane = int(np.argmax(wrong))
        raise Misaligned(f"{space} address {int(address[lane]):#x} is not aligned to {size} bytes", lane)
