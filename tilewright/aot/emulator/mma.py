"""Tensor-core instructions: mma.sync, mma.sp and wgmma.

Fragment layouts follow the PTX ISA's figures. With g = lane // 4, t = lane % 4 and e elements in a 32-bit register, element j of
register r sits at

* A (16 x K): row g + 8 (r % 2), column e t + j + 4 e (r // 2)
* B (K x 8):  row e t + j + 4 e r, column g
* C, D (16 x 8): element i at row g + 8 (i // 2), column 2 t + i % 2

Products are exact and sums are taken in float64 and rounded once, so results are at least as accurate as the hardware's
(whose order of accumulation is not documented). Integer sums are exact modulo 2**32, or clamped with ``.satfinite``.
"""

# mypy: ignore-errors
# ruff: noqa: D102, D103, E501, B007
from __future__ import annotations

import re

import numpy as np

from .memory import AsyncHazard, PTXError
from .numerics import U32, bf16_to_f32, tf32
from .ops import Unsupported, builds
from .parser import Vec

_ELEMENTS = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4, "e4m3": 4, "e5m2": 4}
_G, _T = np.arange(32) // 4, np.arange(32) % 4


def unpack(raw: np.ndarray, kind: str) -> np.ndarray:
    """Elements of uint32 registers [..., n] as float64 [..., n * e]."""
    raw = np.ascontiguousarray(raw)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return bf16_to_f32(raw.view(np.uint16)).astype(np.float64)
    if kind == "tf32":
        return tf32(raw).view(np.float32).astype(np.float64)
    if kind in ("s8", "u8"):
        return raw.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)
    import torch

    dtype = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
    return torch.from_numpy(raw.view(np.uint8)).view(dtype).to(torch.float64).numpy()


def a_index(registers: int, e: int) -> np.ndarray:
    """Flat positions in a row-major [16, K] matrix of the elements [lane, register * e]."""
    r, j = np.divmod(np.arange(registers * e), e)
    columns = registers // 2 * 4 * e
    row = _G[:, None] + 8 * (r % 2)
    return row * columns + e * _T[:, None] + j + 4 * e * (r // 2)


def b_index(registers: int, e: int) -> np.ndarray:
    """Flat positions in a row-major [K, 8] matrix of the elements [lane, register * e]."""
    r, j = np.divmod(np.arange(registers * e), e)
    return (e * _T[:, None] + j + 4 * e * r) * 8 + _G[:, None]


def c_index(tiles: int = 1) -> np.ndarray:
    """Flat positions in a row-major [16, 8 * tiles] matrix of the accumulators [lane, 4 * tiles]."""
    tile, i = np.divmod(np.arange(4 * tiles), 4)
    return (_G[:, None] + 8 * (i // 2)) * 8 * tiles + 8 * tile + 2 * _T[:, None] + i % 2


def place(elements: np.ndarray, index: np.ndarray, shape: tuple) -> np.ndarray:
    """Scatter fragments [warps, 32, n] into matrices [warps, *shape]."""
    out = np.empty((len(elements), shape[0] * shape[1]), elements.dtype)
    out[:, index.reshape(-1)] = elements.reshape(len(elements), -1)
    return out.reshape(-1, *shape)


def accumulate(a, b, c, integer: bool, saturate: bool):
    """a @ b + c in float64, or int64 reduced to the int32 range."""
    product = a @ b
    if not integer:
        return product + c
    total = product.astype(np.int64) + c
    if saturate:
        total = np.clip(total, -(1 << 31), (1 << 31) - 1)
    return total


def read_accumulator(raw, kind):
    """uint32 registers [..., n] -> numbers."""
    if kind == "f32":
        return raw.view(np.float32).astype(np.float64)
    if kind == "s32":
        return raw.view(np.int32).astype(np.int64)
    return raw.view(np.float16).astype(np.float64)


def write_accumulator(value, kind):
    """Numbers -> uint32 registers (two float16 share one)."""
    if kind == "f32":
        return value.astype(np.float32).view(U32)
    if kind == "s32":
        return (value & 0xFFFFFFFF).astype(U32)
    return np.ascontiguousarray(value.astype(np.float16)).view(U32)


def decompress(a, metadata, kind, k, selector, ordered):
    """Expand a 2:4 sparse A. ``a`` [warps, 16, k / 2]; ``metadata`` [warps, 32] uint32; gives [warps, 16, k].

    Two-bit indices, two for each chunk of four columns, low bits first. Where they lie for lane group g (k = 32 with 16-bit types):
    thread 2 s + h holds columns 16 h .. 16 h + 15, row g in its low half and row g + 8 in its high half (s: selector).
    For k = 16 thread s holds both rows. With 8-bit types a register holds 32 columns of one row: thread h' = 2 h + (row >= 8)
    (plus 2 s when k = 32).
    """
    chunks = k // 4
    groups = metadata.reshape(-1, 8, 4)
    row = np.arange(16)[:, None]
    chunk = np.arange(chunks)[None, :]
    if kind in ("f16", "bf16"):
        thread = selector if k == 16 else 2 * selector + chunk // 4
        shift = 16 * (row // 8) + 4 * (chunk % 4)
        if (k == 16 and selector > 3) or (k == 32 and selector > 1):
            raise PTXError(f"sparsity selector {selector} is out of range")
    else:
        if selector > (1 if k == 32 else 0):
            raise PTXError(f"sparsity selector {selector} is out of range")
        thread = (2 * selector if k == 32 else 2 * (chunk // 8)) + row // 8
        shift = 4 * (chunk % 8) + 0 * row
    thread = np.broadcast_to(thread, (16, chunks))
    pair = groups[:, np.broadcast_to(row % 8, (16, chunks)), thread] >> shift.astype(U32)
    first, second = (pair & U32(3)).astype(np.int64), (pair >> U32(2) & U32(3)).astype(np.int64)
    wrong = first >= second if ordered else first == second
    if wrong.any():
        w, r, c = np.argwhere(wrong)[0]
        raise PTXError(
            f"invalid sparsity metadata {int(pair[w, r, c]) & 15:#06b} for row {r}, columns {4 * c}..{4 * c + 3}"
        )
    dense = np.zeros((len(a), 16, chunks, 4))
    packed = a.reshape(len(a), 16, chunks, 2)
    np.put_along_axis(dense, first[..., None], packed[..., :1], axis=3)
    np.put_along_axis(dense, second[..., None], packed[..., 1:], axis=3)
    return dense.reshape(len(a), 16, k)


@builds("mma")
def _mma(ins, machine):
    sparse = ins.parts[1].startswith("sp")
    ordered = ins.parts[1] == "sp::ordered_metadata"
    shape = next((re.fullmatch(r"m(\d+)n(\d+)k(\d+)", p) for p in ins.parts if re.fullmatch(r"m\d+n\d+k\d+", p)), None)
    kinds = [p for p in ins.parts if p in (*_ELEMENTS, "f32", "s32")]
    if shape is None or len(kinds) != 4 or "row" not in ins.parts or "col" not in ins.parts:
        raise Unsupported(ins.opcode)
    m, n, k = map(int, shape.groups())
    d_kind, a_kind, b_kind, c_kind = kinds
    e = _ELEMENTS.get(a_kind, 0)
    groups = [list(op.items) if isinstance(op, Vec) else [op] for op in ins.operands[:4]]
    a_count, b_count = len(groups[1]), len(groups[2])
    stored_k = k // 2 if sparse else k
    if (
        (m, n) != (16, 8)
        or d_kind != c_kind
        or _ELEMENTS.get(b_kind) != e
        or a_count * 2 * e != stored_k
        or b_count * 4 * e != k
        or (sparse and e == 1)
    ):
        raise Unsupported(ins.opcode)
    d = [machine.target(item) for item in groups[0]]
    a, b, c = ([machine.source(item, 32) for item in group] for group in groups[1:])
    metadata = machine.source(ins.operands[4], 32) if sparse else None
    selector = ins.operands[5].value if sparse else 0
    saturate, integer = "satfinite" in ins.parts, d_kind == "s32"
    where_a, where_b, where_c = a_index(a_count, e), b_index(b_count, e), c_index()
    flat_c = where_c.reshape(-1)
    R, name = machine.registers, ins.parts[0]

    def fragment(slots, warps):
        return np.stack([R[s] for s in slots], axis=1).reshape(-1, 32, len(slots))[warps]

    def run(mask):
        warps = machine.full_warps(mask, name)
        left = place(unpack(fragment(a, warps), a_kind), where_a, (16, stored_k))
        right = place(unpack(fragment(b, warps), b_kind), where_b, (k, 8))
        initial = place(read_accumulator(fragment(c, warps), c_kind), where_c, (16, 8))
        if sparse:
            left = decompress(left, R[metadata].reshape(-1, 32)[warps], a_kind, k, selector, ordered)
        result = accumulate(left, right, initial, integer, saturate).reshape(-1, 128)[:, flat_c].reshape(-1, 32, 4)
        packed = write_accumulator(result, d_kind)
        for i, slot in enumerate(d):
            machine.write_warps(slot, np.ascontiguousarray(packed[:, :, i]), mask, warps)
        machine.stats.mma += len(left)
        machine.stats.mma_flops += 2 * m * n * k * len(left)

    return run


# ----------------------------------------------------------------------------------------------------------------- wgmma
def descriptor(word: int):
    """(start, leading offset, stride offset, swizzle width, all in bytes) of a shared-memory matrix descriptor."""
    if word >> 49 & 7:
        raise Unsupported("wgmma descriptor with a base offset")
    width = {0: 0, 1: 128, 2: 64, 3: 32}[word >> 62]
    return (word & 0x3FFF) << 4, (word >> 16 & 0x3FFF) << 4, (word >> 32 & 0x3FFF) << 4, width


def swizzle(address: np.ndarray, width: int) -> np.ndarray:
    """XOR the 16-byte chunk number with the 128-byte line number, as far as ``width`` reaches."""
    return address ^ ((address >> 7) & (width // 16 - 1)) << 4 if width else address


def chunk_addresses(word: int, major: str, extent: int, element: int) -> np.ndarray:
    """Addresses of the 16-byte chunks of an operand tile with 32 bytes of K (K-major) or its 16-bit MN-major form.

    K-major: [extent, 2], a row of the tile in two chunks. MN-major: [16, extent / 8], a column of K in extent / 8 chunks.
    """
    start, leading, stride, width = descriptor(word)
    if major == "k":
        row, chunk = np.arange(extent)[:, None], np.arange(2)[None, :]
        if width:
            offset = row // 8 * stride + row % 8 * width + chunk * 16
        else:
            offset = row // 8 * stride + row % 8 * 16 + chunk * leading
    else:
        column, chunk = np.arange(32 // element)[:, None], np.arange(extent * element // 16)[None, :]
        if width:
            per = width // 16
            offset = column // 8 * stride + column % 8 * width + chunk // per * leading + chunk % per * 16
        else:
            offset = column // 8 * leading + column % 8 * 16 + chunk * stride
    return swizzle(start + offset, width)


@builds("wgmma")
def _wgmma(ins, machine):
    if ins.parts[1] == "fence":
        return lambda mask: None
    if ins.parts[1] == "commit_group":
        return lambda mask: machine.wgmma.commit(mask)
    if ins.parts[1] == "wait_group":
        keep = ins.operands[0].value
        return lambda mask: machine.wgmma.wait(keep, mask)
    if ins.parts[1] != "mma_async" or "sp" in ins.parts:
        raise Unsupported(ins.opcode)
    shape = next(re.fullmatch(r"m64n(\d+)k(\d+)", p) for p in ins.parts if p.startswith("m64n"))
    n, k = map(int, shape.groups())
    d_kind, a_kind, _b_kind = [p for p in ins.parts if p in (*_ELEMENTS, "f32", "s32")]
    e = _ELEMENTS[a_kind]
    d = [machine.target(item) for item in ins.operands[0].items]
    from_registers = isinstance(ins.operands[1], Vec)
    a = (
        [machine.source(item, 32) for item in ins.operands[1].items]
        if from_registers
        else machine.source(ins.operands[1], 64)
    )
    b = machine.source(ins.operands[2], 64)
    scale = machine.source(ins.operands[3], "pred")
    numbers = [op.value for op in ins.operands[4:]]
    sign_a, sign_b = ([*numbers, 1, 1])[:2] if len(numbers) >= 2 else (1, 1)
    transposes = numbers[2:]
    a_major = "mn" if not from_registers and len(transposes) == 2 and transposes[0] else "k"
    b_major = "mn" if transposes and transposes[-1] else "k"
    saturate, integer = "satfinite" in ins.parts, d_kind == "s32"
    where_a, where_d = a_index(4, e), c_index(n // 8)
    flat_d = where_d.reshape(-1)
    R = machine.registers
    bytes_of = 4 // e

    def fetch(word, major, extent, group):
        """Flat offsets and bytes of one operand of one warp group, checked."""
        cta = group * 128 // machine.threads
        addresses = chunk_addresses(word, major, extent, bytes_of)
        machine.effective = np.full(addresses.size, group * 128)
        flat = machine.shared.flat(np.full(addresses.size, cta), addresses.reshape(-1), 16, "wgmma read")
        return flat, machine.shared.async_load(flat, 16), addresses.shape[0]

    def tile(fetched, major):
        """[extent, k] numbers of an operand, which must still be what it was at the issue."""
        flat, before, lines = fetched
        machine.effective = np.full(len(flat), int(flat[0]) // machine.shared.size * machine.threads)
        data = machine.shared.async_load(flat, 16)
        if (data != before).any():
            raise AsyncHazard(
                "shared operand of a wgmma was overwritten before the wait", int(np.argmax((data != before).any(1)))
            )
        values = unpack(data.view(U32).reshape(lines, -1), a_kind)
        return values if major == "k" else values.T

    def uniform(slot, groups):
        words = R[slot].reshape(-1, 128)[groups]
        if (words != words[:, :1]).any():
            raise PTXError("wgmma matrix descriptor differs between the threads of a warp group")
        return [int(w) for w in words[:, 0]]

    def run(mask):
        groups = machine.full_groups(mask, 128, "wgmma")
        b_words = uniform(b, groups)
        a_words = None if from_registers else uniform(a, groups)
        if from_registers:  # captured at issue: changing them before the wait is undefined on the hardware
            fragments = np.stack([R[s] for s in a], axis=1).reshape(-1, 4, 32, 4)[groups]
        keep = R[scale].reshape(-1, 128)[groups, 0]

        captured = {int(group): at for at, group in enumerate(groups)}
        b_tiles = [fetch(word, b_major, n, int(group)) for word, group in zip(b_words, groups, strict=False)]
        a_tiles = (
            None
            if from_registers
            else [fetch(word, a_major, 64, int(group)) for word, group in zip(a_words, groups, strict=False)]
        )

        def execute(ready):
            """Run for the warp groups in ``ready``; the others keep their registers."""
            old = np.stack([R[s] if R[s] is not None else np.zeros(machine.lanes, U32) for s in d], axis=1)
            old = old.reshape(-1, 4, 32, len(d))
            new = old.copy()
            for group in ready:
                at = captured[group]
                if from_registers:
                    left = place(unpack(fragments[at], a_kind), where_a, (16, k)).reshape(64, k)
                else:
                    left = tile(a_tiles[at], a_major)
                right = tile(b_tiles[at], b_major).T
                initial = place(read_accumulator(np.ascontiguousarray(old[group]), d_kind), where_d, (16, n)).reshape(
                    64, n
                )
                if not keep[at]:
                    initial = np.zeros_like(initial)
                result = accumulate(sign_a * left, sign_b * right, initial, integer, saturate)
                result = result.reshape(4, 16 * n)[:, flat_d].reshape(4, 32, -1)
                new[group] = write_accumulator(result, d_kind)
            new = new.reshape(-1, len(d))
            for i, slot in enumerate(d):
                R[slot] = np.ascontiguousarray(new[:, i])
            machine.stats.mma += len(ready)
            machine.stats.mma_flops += 2 * 64 * n * k * len(ready)

        machine.wgmma.issue(execute, groups)

    return run


class AsyncMMA:
    """``wgmma`` groups of each warp group, executed only when waited for: a result used too early is the old accumulator.

    Shared operands are checked and noted at the issue, and must be unchanged when the operation executes.
    """

    def __init__(self, machine):
        self.machine = machine
        count = machine.lanes // 128
        self.open, self.closed = [[] for _ in range(count)], [[] for _ in range(count)]

    def _groups(self, mask):
        return [int(g) for g in self.machine.full_groups(mask, 128, "wgmma")]

    def issue(self, execute, groups):
        for group in groups:
            self.open[int(group)].append(execute)

    def commit(self, mask):
        for group in self._groups(mask):
            self.closed[group].append(self.open[group])
            self.open[group] = []

    def wait(self, keep, mask):
        """Execute, in order of issue, all but the ``keep`` latest committed batches of the groups in ``mask``."""
        due = {}
        for group in self._groups(mask):
            while len(self.closed[group]) > keep:
                due.setdefault(group, []).extend(self.closed[group].pop(0))
        while due:
            first = next(iter(due.values()))[0]
            ready = [group for group, operations in due.items() if operations[0] is first]
            first(ready)
            for group in ready:
                due[group].pop(0)
                if not due[group]:
                    del due[group]

    @property
    def pending(self):
        return any(self.open) or any(self.closed)
