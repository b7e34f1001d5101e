"""Global memory, which consists of the tensors of a launch, and the private arrays of each thread.

An access moves ``size`` bytes (1, 2, 4, 8 or 16) for each active thread: ``address`` has one entry per active thread,
data travel as uint8 arrays [threads, size].
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from tilewright.aot.emulator.errors import OutOfBounds, RaceError
from tilewright.aot.emulator.numerics import U64, WORD, Array
from tilewright.aot.emulator.views import as_rows, check_alignment, rows

NOBODY, SEVERAL = -1, -2
Lanes = slice | Array


class Segment:
    """The storage of one tensor at a range of virtual addresses."""

    def __init__(self, base: int, tensor: torch.Tensor, name: str) -> None:
        self.bytes: Array = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
        self.base, self.end = base, base + len(self.bytes)
        self.name = name
        self.description = (
            f"{name} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} at [{self.base:#x}, {self.end:#x})"
        )
        # The CTA that last stored each byte, and the one that read it: kept where races between CTAs are looked for.
        self.owner: Array | None = None
        self.reader: Array | None = None

    def access_tables(self) -> tuple[Array, Array]:
        """(owner, reader) of each byte."""
        if self.owner is None or self.reader is None:
            self.owner = np.full(len(self.bytes), NOBODY, np.int32)
            self.reader = np.full(len(self.bytes), NOBODY, np.int32)
        return self.owner, self.reader


class GlobalMemory:
    """Tensors at distinct virtual addresses with wide unmapped gaps between them."""

    GAP = 1 << 33  # more than a 32-bit offset that wrapped can jump

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.bases: list[int] = []
        self._next = 0x100000000000
        self._by_storage: dict[int, Segment] = {}

    def map(self, tensor: torch.Tensor, name: str) -> int:
        """Map the storage of ``tensor``, once, and return the address of the tensor's first element.

        Raises ValueError where the tensor is not in ordinary memory.
        """
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: only CPU tensors can be mapped, got one on {tensor.device}")
        key = tensor.untyped_storage().data_ptr()
        segment = self._by_storage.get(key) if key else None
        if segment is None:
            segment = Segment(self._next, tensor, name)
            self._next += -(-len(segment.bytes) // self.GAP) * self.GAP + self.GAP
            self.segments.append(segment)
            self.bases.append(segment.base)
            self._by_storage[key] = segment
        return segment.base + int(tensor.storage_offset()) * tensor.element_size()

    def load(self, address: Array, size: int, cta: Array | None = None) -> Array:
        """Bytes [lanes, size] at ``address`` (uint64). ``cta``: who reads, where races between CTAs are looked for."""
        if cta is not None:
            self._check_race(address, size, cta, "read")
        out = np.empty((len(address), max(size // 8, 1)), WORD[min(size, 8) * 8])
        for segment, lanes, offset in self._by_segment(address, size, "read"):
            out[lanes] = rows(segment.bytes, size)[offset // size]
        return out.view(np.uint8)

    def store(self, address: Array, data: Array, cta: Array | None = None) -> None:
        """Write bytes [lanes, size]; where lanes collide the last one wins. ``cta``: as in ``load``."""
        size = data.shape[1]
        if cta is not None:
            self._check_race(address, size, cta, "write")
        source = as_rows(data, size)
        for segment, lanes, offset in self._by_segment(address, size, "write"):
            rows(segment.bytes, size)[offset // size] = source[lanes]

    def _by_segment(self, address: Array, size: int, verb: str) -> Iterator[tuple[Segment, Lanes, Array]]:
        """(segment, lanes, their offsets in it) such that every lane's access lies inside its segment."""
        check_alignment(address, size, "global")
        if not len(address):
            return
        low, high = int(address.min()), int(address.max())
        at = bisect.bisect_right(self.bases, low) - 1
        if at >= 0 and high + size <= self.segments[at].end:
            yield self.segments[at], slice(None), (address - U64(self.segments[at].base)).astype(np.int64)
            return
        index = np.searchsorted(np.asarray(self.bases, U64), address.astype(U64), "right") - 1
        for at in np.unique(index):
            chosen = np.flatnonzero(index == at)
            if at < 0:
                self._fail(int(address[chosen[0]]), size, int(chosen[0]), verb)
            segment = self.segments[at]
            wrong = address[chosen] + U64(size) > U64(segment.end)
            if wrong.any():
                lane = int(chosen[np.argmax(wrong)])
                self._fail(int(address[lane]), size, lane, verb)
            yield segment, chosen, (address[chosen] - U64(segment.base)).astype(np.int64)

    def _fail(self, address: int, size: int, lane: int, verb: str) -> None:
        null = " (null pointer?)" if address < 4096 else ""
        raise OutOfBounds(f"{verb} of {size} bytes at {address:#x}{null}: {self._nearest(address)}", lane)

    def _nearest(self, address: int) -> str:
        def distance(segment: Segment) -> int:
            return max(segment.base - address, address - segment.end + 1, 0)

        near = min(self.segments, key=distance, default=None)
        if near is None:
            return "no tensor is mapped"
        if address < near.base:
            return f"{near.base - address} bytes before {near.description}"
        if address >= near.end:
            return f"{address - near.end} bytes past the end of {near.description}"
        return f"across the end of {near.description}"

    def _check_race(self, address: Array, size: int, cta: Array, verb: str) -> None:
        """CTAs are unordered: a byte that one stores, no other may read or store."""
        for segment, lanes, offset in self._by_segment(address, size, verb):
            owner, reader = segment.access_tables()
            index = offset[:, None] + np.arange(size)
            me = np.repeat(cta[lanes].astype(np.int32)[:, None], size, axis=1)
            before = owner[index]
            bad = (before != NOBODY) & (before != me)
            how = "stored"
            if verb == "write":
                owner[index] = me
                bad |= owner[index] != me
                if not bad.any():
                    before = reader[index]
                    bad, how = (before != NOBODY) & (before != me), "read"
            else:
                seen = reader[index]
                reader[index] = np.where((seen == NOBODY) | (seen == me), me, SEVERAL)
                clash = (reader[index] != me) & (reader[index] != SEVERAL)
                reader[index[clash]] = SEVERAL
            if bad.any():
                lane = int(np.argmax(bad.any(axis=1)))
                lane = lane if isinstance(lanes, slice) else int(lanes[lane])
                other = int(before[bad][0])
                who = "several CTAs" if other == SEVERAL else f"CTA number {other}" if other >= 0 else "another CTA"
                raise RaceError(f"global race: {verb}s bytes of {segment.name} that {who} {how}", lane)


class LocalMemory:
    """Private arrays of each thread (tables of library functions). Bytes never written read as zero."""

    BASE = 0x1000

    def __init__(self, lanes: int, arrays: Mapping[str, tuple[int, int]]) -> None:
        self.symbols: dict[str, int] = {}
        end = 0
        for name, (alignment, size) in arrays.items():
            start = -(-end // alignment) * alignment
            self.symbols[name] = self.BASE + start
            end = start + size
        self.size = -(-end // 16) * 16
        self.data = np.zeros(self.size * lanes, np.uint8)

    def _index(self, threads: Array, address: Array, size: int) -> Array:
        check_alignment(address, size, "local")
        offset = address.astype(np.int64) - self.BASE
        wrong = (offset < 0) | (offset + size > self.size)
        if wrong.any():
            lane = int(np.argmax(wrong))
            raise OutOfBounds(f"local access of {size} bytes at offset {int(offset[lane])} of {self.size} bytes", lane)
        index: Array = (offset + threads * self.size) // size
        return index

    def load(self, threads: Array, address: Array, size: int) -> Array:
        """Bytes [lanes, size] of the arrays of ``threads``."""
        return rows(self.data, size)[self._index(threads, address, size)].view(np.uint8)

    def store(self, threads: Array, address: Array, data: Array) -> None:
        """Write bytes [lanes, size]."""
        size = data.shape[1]
        rows(self.data, size)[self._index(threads, address, size)] = as_rows(data, size)
