"""Shared memory with the checks that a GPU does not make.

Every byte has a state (never written, valid, target of a copy in flight) and, unless races are off, the warp that wrote
it and the warp that read it since its CTA's last barrier, plus one each. Warps are numbered within their CTA.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tilewright.aot.emulator.errors import AsyncHazard, OutOfBounds, PTXError, RaceError, UninitializedRead
from tilewright.aot.emulator.numerics import Array
from tilewright.aot.emulator.views import as_rows, check_alignment, repeated, rows

POISON, VALID, IN_FLIGHT = 0, 1, 2
MANY = 255  # in place of a warp: several
ASYNC_WARP = 253  # the "warp" that accesses by asynchronous units are attributed to


class SharedMemory:
    """The shared memory of a batch of CTAs, one after another in a flat byte array.

    size: bytes of a CTA. races: "raise", "report" (into ``reports``) or "off". proxies: whether stores by threads need
    a ``fence.proxy.async`` before asynchronous units may read them.
    """

    BASE = 1024  # lowest address: the first kilobyte is reserved, so a null shared address is an error

    def __init__(self, ctas: int, size: int, races: str = "raise", proxies: bool = False) -> None:
        self.size = (size + 1023) // 1024 * 1024
        self.limit = size
        self.races = races
        self.ctas = ctas
        total = self.size * ctas
        self.data: Array = np.zeros(total, np.uint8)
        self.state: Array = np.zeros(total, np.uint8)
        self.writer: Array = np.zeros(total, np.uint8)
        self.reader: Array = np.zeros(total, np.uint8)
        self.atomic: Array | None = None  # bytes that only atomics wrote since the last barrier
        # The warp (plus one) whose ordinary store asynchronous units cannot see yet.
        self.unfenced: Array | None = np.zeros(total, np.uint8) if proxies else None
        self.reports: list[str] = []

    def flat(self, cta: Array, address: Array, size: int, verb: str) -> Array:
        """Flat byte offsets of each lane's shared address, after checks of bounds and alignment."""
        check_alignment(address, size, "shared")
        offset = address.astype(np.int64) - self.BASE
        wrong = (offset < 0) | (offset + size > self.limit)
        if wrong.any():
            lane = int(np.argmax(wrong))
            text = f"shared {verb} of {size} bytes at offset {int(offset[lane])} of {self.limit} bytes"
            raise OutOfBounds(text, lane)
        flat: Array = offset + cta * self.size
        return flat

    def load(self, offset: Array, size: int, warp: Array) -> Array:
        """Bytes [lanes, size] at flat ``offset``, read by each lane's ``warp``."""
        index = offset // size
        self._check_readable(index, size, warp)
        return rows(self.data, size)[index].view(np.uint8)

    def store(self, offset: Array, data: Array, warp: Array) -> None:
        """Write bytes [lanes, size] at flat ``offset``."""
        size = data.shape[1]
        index = offset // size
        self._check_writable(index, size, warp, data)
        self.land(offset, data, warp)
        if self.unfenced is not None:
            rows(self.unfenced, size)[index] = repeated(warp + 1, size)
        if self.races != "off":
            wrong = rows(self.data, size)[index] != as_rows(data, size)
            if wrong.any():
                text = "shared race: lanes of one instruction write different values to one byte"
                self._complain(RaceError, text, wrong)

    def load_atomic(self, offset: Array, size: int, warp: Array) -> Array:
        """As ``load``, for a read-modify-write: in order with other atomics, not with ordinary accesses."""
        index = offset // size
        self._check_state(index, size)
        if self.races != "off":
            if self.atomic is None:
                self.atomic = np.zeros(len(self.data), np.uint8)
            me = repeated(warp + 1, size)
            for table, what in ((self.writer, "wrote"), (self.reader, "read")):
                before = rows(table, size)[index]
                wrong = (before != 0) & (before != me)
                if table is self.writer:
                    wrong &= rows(self.atomic, size)[index] == 0
                if wrong.any():
                    text = f"shared race: atomic on bytes that another warp {what} since the last barrier"
                    self._complain(RaceError, text, wrong)
        return rows(self.data, size)[index].view(np.uint8)

    def store_atomic(self, offset: Array, data: Array, warp: Array) -> None:
        """The write that belongs to ``load_atomic``."""
        size = data.shape[1]
        index = offset // size
        rows(self.data, size)[index] = as_rows(data, size)
        if self.races != "off" and self.atomic is not None:
            table, me = rows(self.writer, size), repeated(warp + 1, size)
            before = table[index]
            table[index] = np.where((before == 0) | (before == me), me, repeated(MANY, size))
            rows(self.atomic, size)[index] = repeated(1, size)

    def barrier(self, ctas: Iterable[int] | None = None) -> None:
        """A CTA-wide barrier of the CTAs listed (default: all): it orders the accesses before it and those after."""
        for table in (self.writer, self.reader):
            table.reshape(self.ctas, self.size)[slice(None) if ctas is None else list(ctas)] = 0

    # ------------------------------------------------------------------------------------------- asynchronous units
    def fence_proxy(self, warps: Iterable[tuple[int, int]] | None = None) -> None:
        """``fence.proxy.async`` by these (CTA, warp): wgmma and bulk copies see what they stored.

        Stores of other warps count too where a barrier lies between them and the fence. Default: every warp.
        """
        if self.unfenced is None:
            return
        if warps is None:
            self.unfenced[:] = 0
            return
        for cta, warp in warps:
            part = slice(cta * self.size, (cta + 1) * self.size)
            seen = self.unfenced[part] == warp + 1
            if self.races != "off":
                seen |= self.writer[part] == 0
            self.unfenced[part][seen] = 0

    def load_async(self, offset: Array, size: int) -> Array:
        """A load by an asynchronous unit: it also wants a proxy fence after ordinary stores."""
        index = offset // size
        if self.unfenced is not None:
            wrong = rows(self.unfenced, size)[index] != 0
            if wrong.any():
                text = "asynchronous read of bytes stored without a fence.proxy.async since"
                self._complain(AsyncHazard, text, wrong)
        return self.load(offset, size, np.full(len(offset), ASYNC_WARP))

    def check_unchanged(self, offset: Array, data: Array, text: str) -> None:
        """Raise AsyncHazard unless all elements still hold ``data``, and are no target of a copy in flight."""
        size = data.shape[1]
        index = offset // size
        same = rows(self.data, size)[index] == as_rows(data, size)
        changed = ~(same & (rows(self.state, size)[index] == repeated(VALID, size)))
        if changed.any():
            self._complain(AsyncHazard, text, changed)

    def begin_copy(self, offset: Array, size: int, warp: Array) -> None:
        """Mark the target of an asynchronous copy: to read or write it before it lands is an error."""
        index = offset // size
        self._check_writable(index, size, warp, None)
        rows(self.state, size)[index] = repeated(IN_FLIGHT, size)

    def land(self, offset: Array, data: Array, warp: Array | None) -> None:
        """Complete a store or a copy; ``warp`` None: in a way that orders it before every later read."""
        size = data.shape[1]
        index = offset // size
        rows(self.data, size)[index] = as_rows(data, size)
        rows(self.state, size)[index] = repeated(VALID, size)
        if self.races != "off":
            rows(self.writer, size)[index] = 0 if warp is None else repeated(warp + 1, size)
        if self.atomic is not None:
            rows(self.atomic, size)[index] = 0

    # ------------------------------------------------------------------------------------------------------- checks
    def _check_state(self, index: Array, size: int) -> None:
        state = rows(self.state, size)[index]
        if (state == repeated(VALID, size)).all():
            return
        state = state.view(np.uint8)
        flying = state == IN_FLIGHT
        if flying.any():
            text = (
                "shared read while an asynchronous copy into it is in flight "
                "(missing cp.async.wait_group or mbarrier wait?)"
            )
            self._complain(AsyncHazard, text, flying)
        self._complain(UninitializedRead, "shared read of bytes that were never written", state != VALID)

    def _check_readable(self, index: Array, size: int, warp: Array) -> None:
        """Raise unless every byte of these elements is valid and free of races; note the readers."""
        self._check_state(index, size)
        if self.races == "off":
            return
        mine = repeated(warp + 1, size)
        if found := self._others(self.writer, index, size, warp):
            self._race("read of bytes another warp wrote since the last barrier ({} wrote, {} reads)", *found)
        table = rows(self.reader, size)
        old = table[index]
        if (old == mine).all():
            return
        if ((old == 0) | (old == mine)).all():
            new = np.broadcast_to(mine, old.shape)
        else:
            me, before = self._bytewise(warp, size), old.view(np.uint8)
            new = as_rows(np.where((before == 0) | (before == me), me, np.uint8(MANY)), size)
        table[index] = new
        clash = table[index] != new
        if clash.any():  # several warps read the same bytes in this very instruction
            lanes = clash.any(axis=1)
            table[index[lanes]] = repeated(MANY, size)

    def _check_writable(self, index: Array, size: int, warp: Array, data: Array | None) -> None:
        """Raise where another warp read these bytes since the last barrier, or wrote something else there."""
        state = rows(self.state, size)[index]
        if (state & repeated(IN_FLIGHT, size)).any():
            text = "shared write while an asynchronous copy into it is in flight"
            self._complain(AsyncHazard, text, state.view(np.uint8) == IN_FLIGHT)
        if self.races == "off":
            return
        if found := self._others(self.reader, index, size, warp):
            self._race("write to bytes another warp read since the last barrier ({} read, {} writes)", *found)
        if found := self._others(self.writer, index, size, warp):
            before, me, wrong = found
            if data is not None:  # the same value written twice does no harm
                wrong &= rows(self.data, size)[index].view(np.uint8) != data
            if wrong.any():
                self._race("two warps wrote different values to the same bytes ({} and {})", before, me, wrong)

    def _others(self, table: Array, index: Array, size: int, warp: Array) -> tuple[Array, Array, Array] | None:
        """(warps in ``table``, the accessing warps, where the first is another one) bytewise; None if nowhere."""
        held = rows(table, size)[index]
        if ((held == 0) | (held == repeated(warp + 1, size))).all():
            return None
        before, me = held.view(np.uint8), self._bytewise(warp, size)
        wrong = (before != 0) & (before != me)
        return (before, me, wrong) if wrong.any() else None

    def _race(self, text: str, before: Array, me: Array, wrong: Array) -> None:
        """``text`` with the first two warps that meet."""
        first = text.format(self._who(before[wrong][0]), self._who(me[wrong][0]))
        self._complain(RaceError, f"shared race: {first}", wrong)

    @staticmethod
    def _bytewise(warp: Array, size: int) -> Array:
        return np.repeat((warp + 1).astype(np.uint8)[:, None], size, axis=1)

    @staticmethod
    def _who(number: int) -> str:
        if number == MANY:
            return "several warps"
        return "an asynchronous unit" if number == ASYNC_WARP + 1 else f"warp {int(number) - 1}"

    def _complain(self, kind: type[PTXError], text: str, wrong: Array) -> None:
        if kind is RaceError and self.races == "report":
            if len(self.reports) < 100:
                self.reports.append(text)
            return
        raise kind(text, int(np.argmax(wrong.any(axis=1))))
