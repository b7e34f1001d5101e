"""How the operands of tensor-core instructions lie in the registers of a warp.

Layouts follow the figures of the PTX ISA. With g = lane // 4, t = lane % 4 and e elements in a 32-bit register,
element j of register r sits at

* A (16 x K): row g + 8 (r % 2), column e t + j + 4 e (r // 2)
* B (K x 8): row e t + j + 4 e r, column g
* C, D (16 x 8): element i at row g + 8 (i // 2), column 2 t + i % 2

Products are exact and sums are taken in float64 and rounded once, so results are at least as accurate as the
hardware's, whose order of accumulation is not documented. Integer sums are exact modulo 2**32, or clamped with
``.satfinite``.
"""

from __future__ import annotations

import re

import numpy as np

from tilewright.aot.emulator.errors import PTXError, Unsupported
from tilewright.aot.emulator.numerics import FLOAT8, U32, Array, decode, encode, to_tf32
from tilewright.aot.emulator.program import Instruction

#: Elements of each type in a 32-bit register.
ELEMENTS = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4, "e4m3": 4, "e5m2": 4}
#: Types of accumulators.
ACCUMULATORS = ("f16", "f32", "s32")
_WORDS = {1: np.uint32, 2: np.uint16, 4: np.uint8}
_G, _T = np.arange(32) // 4, np.arange(32) % 4


def form_of(instruction: Instruction, shape: str, types: int, other: set[str]) -> tuple[list[int], list[str]]:
    """(sizes, types) that an opcode names: one part like ``shape``, so many types, and no parts but ``other`` ones."""
    parts = instruction.parts[1:]
    found = next((match for part in parts if (match := re.fullmatch(shape, part))), None)
    kinds = [part for part in parts if part in (*ELEMENTS, *ACCUMULATORS)]
    if found is None or len(kinds) != types or set(parts) - other - set(kinds) - {found[0]}:
        raise Unsupported(instruction.opcode)
    return [int(size) for size in found.groups()], kinds


def split(raw: Array, kind: str) -> Array:
    """Elements of uint32 registers [..., n] as words [..., n * e]."""
    return np.ascontiguousarray(raw).view(_WORDS[ELEMENTS[kind]])


def numbers(words: Array, kind: str) -> Array:
    """Elements as float64."""
    if kind in ("f16", "bf16"):
        return decode(words, kind).astype(np.float64)
    if kind == "tf32":
        return to_tf32(words).view(np.float32).astype(np.float64)
    if kind in ("s8", "u8"):
        return words.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)
    return FLOAT8[kind][words]


def a_index(registers: int, e: int) -> Array:
    """Flat positions in a row-major [16, K] matrix of the elements [lane, register * e]."""
    r, j = np.divmod(np.arange(registers * e), e)
    columns = registers // 2 * 4 * e
    row = _G[:, None] + 8 * (r % 2)
    index: Array = row * columns + e * _T[:, None] + j + 4 * e * (r // 2)
    return index


def b_index(registers: int, e: int) -> Array:
    """Flat positions in a row-major [K, 8] matrix of the elements [lane, register * e]."""
    r, j = np.divmod(np.arange(registers * e), e)
    index: Array = (e * _T[:, None] + j + 4 * e * r) * 8 + _G[:, None]
    return index


def c_index(tiles: int = 1) -> Array:
    """Flat positions in a row-major [16, 8 * tiles] matrix of the accumulators [lane, 4 * tiles]."""
    tile, i = np.divmod(np.arange(4 * tiles), 4)
    index: Array = (_G[:, None] + 8 * (i // 2)) * 8 * tiles + 8 * tile + 2 * _T[:, None] + i % 2
    return index


def order_of(index: Array) -> Array:
    """Where in the fragments of a warp each element of a matrix is: the inverse of one of the functions above."""
    return np.argsort(index.reshape(-1))


def arrange(elements: Array, order: Array, shape: tuple[int, int]) -> Array:
    """Fragments [warps, 32, n] -> matrices [warps, *shape]."""
    return np.take(elements.reshape(len(elements), -1), order, axis=1).reshape(-1, *shape)


def accumulate(a: Array, b: Array, c: Array, integer: bool, saturate: bool) -> Array:
    """a @ b + c in float64, or in int64, clamped to the range of int32 with ``saturate``."""
    product = a @ b
    if not integer:
        return product + c
    total = product.astype(np.int64) + c
    return np.clip(total, -(1 << 31), (1 << 31) - 1) if saturate else total


def read_accumulator(raw: Array, kind: str) -> Array:
    """uint32 registers [..., n] -> numbers."""
    number = decode(raw, "f16x2" if kind == "f16" else kind)
    return number.astype(np.int64 if kind == "s32" else np.float64)


def write_accumulator(value: Array, kind: str) -> Array:
    """Numbers -> uint32 registers (two float16 share one)."""
    return encode(value, "f16x2" if kind == "f16" else kind)


def decompress(a: Array, metadata: Array, kind: str, k: int, selector: int, ordered: bool) -> Array:
    """Expand a 2:4 sparse A. ``a`` [warps, 16, k / 2]; ``metadata`` [warps, 32] uint32; gives [warps, 16, k].

    Two-bit indices, two for each chunk of four columns, low bits first. Where they lie for lane group g (k = 32 with
    16-bit types): thread 2 s + h holds columns 16 h .. 16 h + 15, row g in its low half and row g + 8 in its high half
    (s: selector). For k = 16 thread s holds both rows. With 8-bit types a register holds 32 columns of one row: thread
    2 h + (row >= 8), plus 2 s when k = 32. Raises PTXError for indices that are not two different columns in order.
    """
    chunks = k // 4
    groups = metadata.reshape(-1, 8, 4)
    row, chunk = np.arange(16)[:, None], np.arange(chunks)[None, :]
    halves = kind in ("f16", "bf16")
    selectors = {16: 4, 32: 2}.get(k, 0) if halves else {32: 2, 64: 1}.get(k, 0)
    if selector >= selectors:
        raise PTXError(f"sparsity selector {selector} is out of range")
    if halves:
        thread = selector if k == 16 else 2 * selector + chunk // 4
        shift = 16 * (row // 8) + 4 * (chunk % 4)
    else:
        thread = (2 * selector if k == 32 else 2 * (chunk // 8)) + row // 8
        shift = 4 * (chunk % 8) + 0 * row
    thread = np.broadcast_to(thread, (16, chunks))
    pair = groups[:, np.broadcast_to(row % 8, (16, chunks)), thread] >> shift.astype(U32)
    first, second = (pair & U32(3)).astype(np.int64), (pair >> U32(2) & U32(3)).astype(np.int64)
    wrong = first >= second if ordered else first == second
    if wrong.any():
        w, r, c = (int(i) for i in np.argwhere(wrong)[0])
        bits = int(pair[w, r, c]) & 15
        raise PTXError(f"invalid sparsity metadata {bits:#06b} for row {r}, columns {4 * c}..{4 * c + 3}")
    dense = np.zeros((len(a), 16, chunks, 4))
    packed = a.reshape(len(a), 16, chunks, 2)
    np.put_along_axis(dense, first[..., None], packed[..., :1], axis=3)
    np.put_along_axis(dense, second[..., None], packed[..., 1:], axis=3)
    return dense.reshape(len(a), 16, k)
