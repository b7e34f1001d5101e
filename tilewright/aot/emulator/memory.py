"""Global and shared memory with the checks that a GPU does not make.

Both memories are accessed by whole vectors of lanes: ``address`` is an integer array with one entry per active lane and an
access moves ``size`` bytes (1, 2, 4, 8 or 16) per lane. Data travel as uint8 arrays of shape [lanes, size].
"""

# mypy: ignore-errors
# ruff: noqa: D102, D103, E501, B007
from __future__ import annotations

import bisect

import numpy as np
import torch

WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class PTXError(RuntimeError):
    """A defect found while running a kernel; the machine adds kernel, CTA, thread and instruction."""

    def __init__(self, message, lane=None):
        super().__init__(message)
        self.lane = lane  # index into the active lanes of the access, where one lane is to blame


class OutOfBounds(PTXError):
    """An access outside every tensor, or across the end of one."""


class Misaligned(PTXError):
    """An address that is not a multiple of the access size."""


class UninitializedRead(PTXError):
    """Shared memory read before it was written."""


class AsyncHazard(PTXError):
    """Shared memory touched while an asynchronous copy into it is still in flight."""


class RaceError(PTXError):
    """Two warps touch the same shared byte between two barriers and at least one writes."""


def rows(buffer: np.ndarray, size: int) -> np.ndarray:
    """View a flat uint8 buffer as [count, words] of the widest word for ``size``-byte elements (a tail is cut)."""
    word = WORD[min(size, 8)]
    usable = buffer[: len(buffer) // size * size]
    return usable.view(word).reshape(-1, max(size // 8, 1))


def as_rows(data: np.ndarray, size: int) -> np.ndarray:
    """View [lanes, size] bytes as [lanes, words]."""
    return np.ascontiguousarray(data).view(WORD[min(size, 8)])


def check_alignment(address, size, space):
    wrong = (address & address.dtype.type(size - 1)) != 0
    if size > 1 and wrong.any():
        lane = int(np.argmax(wrong))
        raise Misaligned(f"{space} address {int(address[lane]):#x} is not aligned to {size} bytes", lane)


class Segment:
    """One tensor's storage at a virtual address range."""

    def __init__(self, base, tensor, name):
        storage = tensor.untyped_storage()
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.base, self.end, self.name, self.tensor = base, base + len(self.bytes), name, tensor
        self.owner = None  # CTA that last stored each byte, when tracked

    def __str__(self):
        kind = str(self.tensor.dtype).replace("torch.", "")
        return f"{self.name} {kind}{list(self.tensor.shape)} at [{self.base:#x}, {self.end:#x})"


class GlobalMemory:
    """Tensors at distinct virtual addresses with unmapped gaps between them."""

    GAP = 1 << 20

    def __init__(self):
        self.segments, self.bases, self._next = [], [], 0x7F0000000000
        self._by_storage = {}

    def map(self, tensor: torch.Tensor, name: str) -> int:
        """Map the storage of ``tensor`` (once) and return the address of its first element."""
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: only CPU tensors can be mapped")
        key = tensor.untyped_storage().data_ptr()
        segment = self._by_storage.get(key) if key else None
        if segment is None:
            segment = Segment(self._next, tensor, name)
            self._next += (len(segment.bytes) + 2 * self.GAP) // self.GAP * self.GAP
            self.segments.append(segment)
            self.bases.append(segment.base)
            self._by_storage[key] = segment
        return segment.base + tensor.storage_offset() * tensor.element_size()

    def _nearest(self, address):
        def distance(segment):
            return max(segment.base - address, address - segment.end + 1, 0)

        near = min(self.segments, key=distance, default=None)
        if near is None:
            return "no tensor is mapped"
        if address < near.base:
            return f"{near.base - address} bytes before {near}"
        return f"{address - near.end} bytes past the end of {near}" if address >= near.end else f"inside {near}"

    def _fail(self, address, size, lane, verb):
        kind = " (null pointer?)" if address < 4096 else ""
        raise OutOfBounds(f"{verb} of {size} bytes at {address:#x}{kind}: {self._nearest(address)}", lane)

    def _groups(self, address, size, verb):
        """Yield (segment, lane selector) so that every lane's access lies inside its segment."""
        check_alignment(address, size, "global")
        low, high = int(address.min()), int(address.max())
        at = bisect.bisect_right(self.bases, low) - 1
        if at >= 0 and high + size <= self.segments[at].end:
            yield self.segments[at], slice(None)
            return
        index = np.searchsorted(np.asarray(self.bases, np.uint64), address.astype(np.uint64), "right") - 1
        for at in np.unique(index):
            chosen = np.flatnonzero(index == at)
            if at < 0:
                self._fail(int(address[chosen[0]]), size, int(chosen[0]), verb)
            segment = self.segments[at]
            wrong = address[chosen] + np.uint64(size) > np.uint64(segment.end)
            if wrong.any():
                lane = int(chosen[np.argmax(wrong)])
                self._fail(int(address[lane]), size, lane, verb)
            yield segment, chosen

    def _check_owner(self, address, size, cta, verb):
        """Ordinary accesses by different CTAs to bytes that one of them stores are unordered: a race."""
        for segment, lanes in self._groups(address, size, verb):
            if segment.owner is None:
                segment.owner = np.full(len(segment.bytes), -1, np.int32)
            index = (address[lanes] - np.uint64(segment.base)).astype(np.int64)[:, None] + np.arange(size)
            me = np.repeat(cta[lanes].astype(np.int32)[:, None], size, axis=1)
            if verb == "writes":
                before = segment.owner[index]
                segment.owner[index] = me
                bad = ((before >= 0) & (before != me)) | (segment.owner[index] != me)
            else:
                before = segment.owner[index]
                bad = (before >= 0) & (before != me)
            if bad.any():
                lane = int(np.argmax(bad.any(axis=1)))
                lane = lane if isinstance(lanes, slice) else int(lanes[lane])
                raise RaceError(
                    f"global race: {verb} bytes of {segment.name} that CTA number {int(before[bad][0])} stored", lane
                )

    def load(self, address: np.ndarray, size: int, cta: np.ndarray | None = None) -> np.ndarray:
        """Bytes [lanes, size] at ``address`` (uint64). ``cta``: the reader of each lane, to check that no other CTA wrote there."""
        if cta is not None:
            self._check_owner(address, size, cta, "reads")
        out = np.empty((len(address), max(size // 8, 1)), WORD[min(size, 8)])
        for segment, lanes in self._groups(address, size, "read"):
            index = (address[lanes] - np.uint64(segment.base)) // np.uint64(size)
            out[lanes] = rows(segment.bytes, size)[index.astype(np.int64)]
        return out.view(np.uint8)

    def store(self, address: np.ndarray, data: np.ndarray, cta: np.ndarray | None = None) -> None:
        """Write bytes [lanes, size]; when lanes collide the last one wins. ``cta``: as in ``load``."""
        size = data.shape[1]
        if cta is not None:
            self._check_owner(address, size, cta, "writes")
        source = as_rows(data, size)
        for segment, lanes in self._groups(address, size, "write"):
            index = (address[lanes] - np.uint64(segment.base)) // np.uint64(size)
            rows(segment.bytes, size)[index.astype(np.int64)] = source[lanes]


class LocalMemory:
    """Private arrays of each thread (spilled tables of library functions). Uninitialised bytes read as zero."""

    BASE = 0x1000

    def __init__(self, lanes: int, arrays: dict):
        self.symbols, at = {}, 0
        for name, (align, size) in arrays.items():
            at = -(-at // align) * align
            self.symbols[name] = self.BASE + at
            at += size
        self.size = -(-at // 16) * 16
        self.data = np.zeros(self.size * lanes, np.uint8)

    def _index(self, threads, address, size):
        check_alignment(address, size, "local")
        offset = address.astype(np.int64) - self.BASE
        wrong = (offset < 0) | (offset + size > self.size)
        if wrong.any():
            lane = int(np.argmax(wrong))
            raise OutOfBounds(f"local access of {size} bytes at offset {int(offset[lane])} of {self.size} bytes", lane)
        return (offset + threads * self.size) // size

    def load(self, threads, address, size):
        return rows(self.data, size)[self._index(threads, address, size)].view(np.uint8)

    def store(self, threads, address, data):
        size = data.shape[1]
        rows(self.data, size)[self._index(threads, address, size)] = as_rows(data, size)


POISON, VALID, IN_FLIGHT = 0, 1, 2
MANY = 255
ASYNC_WARP = 253  # the "warp" that accesses by asynchronous units are attributed to


class SharedMemory:
    """The shared memory of a batch of CTAs, one after another in a flat byte array.

    Each byte has a state (never written, valid, target of a copy in flight) and, when ``races`` is not "off", the warp that
    wrote it and the warp that read it since its CTA's last barrier. ``races`` is "raise", "report" or "off".
    """

    BASE = 1024  # lowest address: the first kilobyte is reserved, so a null shared address is an error

    def __init__(self, ctas: int, size: int, races: str = "raise", proxies: bool = False):
        self.size = (size + 1023) // 1024 * 1024
        self.limit = size
        self.races = races
        total = self.size * ctas
        self.data = np.zeros(total, np.uint8)
        self.state = np.zeros(total, np.uint8)
        self.writer = np.zeros(total, np.uint8)
        self.reader = np.zeros(total, np.uint8)
        self.unfenced = np.zeros(total, bool) if proxies else None  # ordinary stores not yet visible to the async proxy
        self.reports = []

    def flat(self, cta: np.ndarray, address: np.ndarray, size: int, verb: str) -> np.ndarray:
        """Flat byte offsets of per-lane shared addresses, after bounds and alignment checks."""
        check_alignment(address, size, "shared")
        offset = address.astype(np.int64) - self.BASE
        wrong = (offset < 0) | (offset + size > self.limit)
        if wrong.any():
            lane = int(np.argmax(wrong))
            raise OutOfBounds(
                f"shared {verb} of {size} bytes at offset {int(offset[lane])} of {self.limit} bytes", lane
            )
        return offset + cta * self.size

    def _complain(self, kind, text, bad):
        lane = int(np.argmax(bad.any(axis=1)))
        error = kind(text, lane)
        if kind is RaceError and self.races == "report":
            if len(self.reports) < 100:
                self.reports.append(text)
            return
        raise error

    def load(self, offset: np.ndarray, size: int, warp: np.ndarray) -> np.ndarray:
        """Bytes [lanes, size] at flat ``offset``; ``warp`` is each lane's warp number within its CTA, from 0."""
        index = offset // size
        self.check_readable(index, size, warp)
        return rows(self.data, size)[index].view(np.uint8)

    def check_readable(self, index, size, warp):
        """Raise unless every byte of the ``size``-byte elements at ``index`` is valid and race-free; note the readers."""
        state = rows(self.state, size)[index].view(np.uint8)
        bad = state != VALID
        if bad.any():
            if (state == IN_FLIGHT).any():
                self._complain(
                    AsyncHazard,
                    "shared read while an asynchronous copy into it is in flight (missing cp.async.wait_group?)",
                    state == IN_FLIGHT,
                )
            self._complain(UninitializedRead, "shared read of bytes that were never written", bad)
        if self.races == "off":
            return
        me = np.repeat((warp + 1).astype(np.uint8)[:, None], size, axis=1)
        writer = rows(self.writer, size)[index].view(np.uint8)
        bad = (writer != 0) & (writer != me)
        if bad.any():
            self._complain(
                RaceError,
                "shared race: read of bytes another warp wrote since the last barrier "
                f"(warp {int(writer[bad][0]) - 1} wrote, warp {int(me[bad][0]) - 1} reads)",
                bad,
            )
        table = rows(self.reader, size)
        old = table[index].view(np.uint8)
        new = np.where((old == 0) | (old == me), me, np.uint8(MANY))
        table[index] = as_rows(new, size)
        clash = table[index].view(np.uint8) != new
        if clash.any():  # several warps read the same byte in this very instruction
            lanes = clash.any(axis=1)
            new[clash] = MANY
            table[index[lanes]] = as_rows(new[lanes], size)

    def check_writable(self, index, size, warp, data=None):
        """Raise when another warp read these bytes since the last barrier, or wrote something else there."""
        state = rows(self.state, size)[index].view(np.uint8)
        if (state == IN_FLIGHT).any():
            self._complain(
                AsyncHazard, "shared write while an asynchronous copy into it is in flight", state == IN_FLIGHT
            )
        if self.races == "off":
            return
        me = np.repeat((warp + 1).astype(np.uint8)[:, None], size, axis=1)
        reader = rows(self.reader, size)[index].view(np.uint8)
        bad = (reader != 0) & (reader != me)
        if bad.any():
            who = int(reader[bad][0])
            self._complain(
                RaceError,
                "shared race: write to bytes another warp read since the last barrier "
                f"({'several warps' if who == MANY else f'warp {who - 1}'} read, warp "
                f"{int(me[bad][0]) - 1} writes)",
                bad,
            )
        writer = rows(self.writer, size)[index].view(np.uint8)
        bad = (writer != 0) & (writer != me)
        if data is not None and bad.any():
            bad &= rows(self.data, size)[index].view(np.uint8) != data
        if bad.any():
            self._complain(
                RaceError,
                "shared race: two warps wrote different values to the same bytes "
                f"(warps {int(writer[bad][0]) - 1} and {int(me[bad][0]) - 1})",
                bad,
            )

    def store(self, offset: np.ndarray, data: np.ndarray, warp: np.ndarray) -> None:
        """Write bytes [lanes, size] at flat ``offset``."""
        size = data.shape[1]
        index = offset // size
        self.check_writable(index, size, warp, data)
        self._commit(index, size, data, warp)
        if self.unfenced is not None:
            rows(self.unfenced.view(np.uint8), size)[index] = np.frombuffer(bytes([1] * size), WORD[min(size, 8)])
        if self.races != "off":
            bad = rows(self.data, size)[index].view(np.uint8) != data
            if bad.any():
                self._complain(
                    RaceError, "shared race: lanes of one instruction write different values to one byte", bad
                )

    def fence_proxy(self, ctas=None) -> None:
        """``fence.proxy.async``: make the stores of these CTAs visible to wgmma and bulk copies."""
        if self.unfenced is None:
            return
        for cta in range(len(self.data) // self.size) if ctas is None else ctas:
            self.unfenced[cta * self.size : (cta + 1) * self.size] = False

    def async_load(self, offset: np.ndarray, size: int) -> np.ndarray:
        """A load by the async proxy (attributed to no warp): also wants a proxy fence after ordinary stores."""
        index = offset // size
        if self.unfenced is not None:
            bad = rows(self.unfenced.view(np.uint8), size)[index].view(np.uint8) != 0
            if bad.any():
                self._complain(AsyncHazard, "asynchronous read of bytes stored without a fence.proxy.async since", bad)
        return self.load(offset, size, np.full(len(offset), ASYNC_WARP))

    def begin_copy(self, offset, size, warp):
        """Mark the target of an asynchronous copy: reading or writing it before it lands is an error."""
        index = offset // size
        self.check_writable(index, size, warp)
        table = rows(self.state, size)
        table[index] = np.frombuffer(bytes([IN_FLIGHT] * size), WORD[min(size, 8)])

    def land_copy(self, offset, data, warp):
        """Complete an asynchronous copy; ``warp`` None: in a way that orders it before every later read (a barrier)."""
        self._commit(offset // data.shape[1], data.shape[1], data, warp)

    def _commit(self, index, size, data, warp):
        rows(self.data, size)[index] = as_rows(data, size)
        rows(self.state, size)[index] = np.frombuffer(bytes([VALID] * size), WORD[min(size, 8)])
        if self.races != "off":
            me = (
                np.zeros(data.shape, np.uint8)
                if warp is None
                else np.repeat((warp + 1).astype(np.uint8)[:, None], size, axis=1)
            )
            rows(self.writer, size)[index] = as_rows(me, size)

    def barrier(self, ctas=None) -> None:
        """A CTA-wide barrier for the CTAs listed (all by default): accesses before it are ordered before those after."""
        if ctas is None:
            self.writer[:] = 0
            self.reader[:] = 0
            return
        for cta in ctas:
            self.writer[cta * self.size : (cta + 1) * self.size] = 0
            self.reader[cta * self.size : (cta + 1) * self.size] = 0
