"""Bulk tensor copies (TMA) and the shared-memory barriers that complete them, as kernels without warp roles use them.

A tensor map made on the device is kept as a Python record beside the memory it lives in. A copy's bytes are in flight
from its issue until a thread waits on its barrier; then they land and the barrier's phase may complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.aot.emulator.addresses import address_of
from tilewright.aot.emulator.async_copies import build_async_copy
from tilewright.aot.emulator.control import Queue
from tilewright.aot.emulator.errors import PTXError, Unsupported
from tilewright.aot.emulator.numerics import U64, Array
from tilewright.aot.emulator.program import SINK, Address, Instruction, TensorAddress
from tilewright.aot.emulator.registry import Mask, Run, builds, literal
from tilewright.aot.emulator.wgmma import swizzle

if TYPE_CHECKING:
    from tilewright.aot.emulator.machine import Machine

_ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2}
_SWIZZLE_BYTES = {0: 0, 1: 32, 2: 64, 3: 128}
MapKey = tuple[str, int, int]


@dataclass
class TensorMap:
    """Fields by name; those with an entry for each dimension are dicts. Dimension 0 is contiguous, strides are in
    bytes.
    """

    values: dict[str, Any] = field(default_factory=dict)

    def set(self, name: str, index: int | None, value: int) -> None:
        """Set a field, or its entry for one dimension."""
        if index is None:
            self.values[name] = value
        else:
            self.values.setdefault(name, {})[index] = value

    def copy(self) -> TensorMap:
        """An independent copy."""
        return TensorMap({k: dict(v) if isinstance(v, dict) else v for k, v in self.values.items()})

    def box(self, corner: list[int]) -> tuple[Array, Array, int]:
        """(global addresses, inside the tensor, bytes of one) of the elements of a box, contiguous dimension last."""
        values = self.values
        rank, size = values["rank"] + 1, _ELEMENT_BYTES[values["elemtype"]]
        spread = any(step != 1 for step in values["element_stride"].values())
        if values.get("interleave_layout") or values.get("fill_mode") or spread:
            raise Unsupported("tensor map with interleaving, NaN fill or element strides")
        where: Array = np.zeros((1,) * rank, np.int64) + values["global_address"]
        inside: Array = np.ones((1,) * rank, bool)
        for dim in range(rank):
            index = corner[dim] + np.arange(values["box_dim"][dim])
            shape = [1] * rank
            shape[rank - 1 - dim] = -1
            step = size if dim == 0 else values["global_stride"][dim - 1]
            where = where + index.reshape(shape) * step
            inside = inside & ((index >= 0) & (index < values["global_dim"][dim])).reshape(shape)
        return where, np.broadcast_to(inside, where.shape), size


@dataclass
class Barrier:
    """An mbarrier: arrivals and transaction bytes still missing from the current phase, and that phase's number."""

    count: int
    missing: int
    bytes: int = 0
    phase: int = 0
    landing: list[tuple[Array, Array, int]] = field(default_factory=list)  # (flat offsets, data, bytes) in flight

    def settle(self) -> None:
        """Complete the phase if nothing is missing."""
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.count


class BulkCopies:
    """Tensor maps, barriers and unfinished stores of one batch of CTAs."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.maps: dict[MapKey, TensorMap] = {}  # in "shared" of a CTA, or in "global" (CTA 0), at an address
        self.barriers: dict[tuple[int, int], Barrier] = {}
        # By thread, (flat offsets, data) of shared memory that its bulk stores may still read.
        self.stores: dict[int, Queue[tuple[Array, Array]]] = {}

    def commit(self, mask: Mask) -> None:
        """Close the current group of stores of the threads in ``mask``."""
        for thread in self._storing(mask):
            self.stores[thread].commit()

    def wait(self, keep: int, mask: Mask) -> None:
        """All but the ``keep`` latest groups of the threads in ``mask`` have been read from shared memory."""
        for thread in self._storing(mask):
            closed = self.stores[thread].closed
            while len(closed) > keep:
                self._check_unchanged(thread, closed.pop(0))

    def _storing(self, mask: Mask) -> list[int]:
        """Threads in ``mask`` that have stored."""
        return [thread for thread in self.stores if mask is None or mask[thread]]

    def finish(self) -> None:
        """Check the stores that were never waited for."""
        for thread, queue in self.stores.items():
            self._check_unchanged(thread, [store for group in (*queue.closed, queue.open) for store in group])

    def _check_unchanged(self, thread: int, stores: list[tuple[Array, Array]]) -> None:
        text = "shared memory overwritten while a bulk store may still read it (missing cp.async.bulk.wait_group?)"
        for flat, data in stores:
            self.machine.effective = np.full(len(flat), thread)
            self.machine.shared.check_unchanged(flat, data, text)

    def barrier(self, cta: int, at: int) -> Barrier:
        """The barrier at a shared address of a CTA."""
        if (cta, at) not in self.barriers:
            raise PTXError(f"shared address {at:#x} is not an initialised mbarrier")
        return self.barriers[cta, at]

    def shared_layout(self, tensor_map: TensorMap, start: int, shape: tuple[int, ...], size: int, cta: int) -> Array:
        """Flat shared offsets of a box's elements, swizzled."""
        inner = shape[-1] * size
        width = _SWIZZLE_BYTES[tensor_map.values["swizzle_mode"]]
        if width and inner > width:
            raise PTXError(f"TMA box of {inner} bytes in a row exceeds its {width}-byte swizzle")
        if start % 128:
            raise PTXError(f"TMA shared address {start:#x} is not aligned to 128 bytes")
        linear = start + np.arange(int(np.prod(shape))) * size
        return self.machine.shared.flat(np.full(linear.size, cta), swizzle(linear, width), size, "bulk access")


@builds("tensormap")
def _tensormap(instruction: Instruction, machine: Machine) -> Run:
    operands, values = instruction.operands, machine.values
    if instruction.parts[1] == "replace":
        name = instruction.parts[3]
        place = address_of(machine, operands[0], 64)
        index = literal(operands[1]) if len(operands) == 3 else None
        value = machine.source(operands[-1], 64 if instruction.kind == "b64" else 32)

        def replace(mask: Mask) -> None:
            at = place()
            for thread in machine.threads_of(mask):
                key = ("shared", int(machine.cta_of[thread]), int(at[thread]))
                machine.bulk.maps.setdefault(key, TensorMap()).set(name, index, int(values[value][thread]))

        return replace
    if instruction.parts[1] == "cp_fenceproxy":
        target, origin = address_of(machine, operands[0], 64), address_of(machine, operands[1], 64)

        def copy(mask: Mask) -> None:
            machine.effective = mask
            threads = machine.threads_of(mask)
            for cta in np.unique(machine.cta_of[threads]):
                thread = int(threads[machine.cta_of[threads] == cta][0])
                at = int(target()[thread])
                pieces = np.full(8, at, U64) + np.arange(8, dtype=U64) * U64(16)
                machine.memory.store(pieces, np.zeros((8, 16), np.uint8))
                key = ("shared", int(cta), int(origin()[thread]))
                machine.bulk.maps["global", 0, at] = machine.bulk.maps.pop(key).copy()

        return copy
    raise Unsupported(instruction.opcode)


@builds("mbarrier")
def _mbarrier(instruction: Instruction, machine: Machine) -> Run:
    values, what = machine.values, instruction.parts[1]
    operands = list(instruction.operands)
    waits = what in ("try_wait", "test_wait")
    if what not in ("init", "inval", "arrive", "expect_tx") and not (waits and "parity" in instruction.parts):
        raise Unsupported(instruction.opcode)
    destination = operands.pop(0) if waits or what == "arrive" else SINK
    if what == "arrive" and destination != SINK:
        raise Unsupported(f"{instruction.opcode} returning a state")
    place = address_of(machine, operands[0])
    amount = machine.source(operands[1], 32) if len(operands) > 1 else None
    slot = machine.target(destination) if waits else 0
    expects = "expect_tx" in instruction.parts

    def each(mask: Mask) -> list[tuple[int, int, int]]:
        """(CTA, address, number) of each active thread."""
        at, number = place(), None if amount is None else values[amount]
        return [
            (int(machine.cta_of[thread]), int(at[thread]), 1 if number is None else int(number[thread]))
            for thread in machine.threads_of(mask)
        ]

    def wait(mask: Mask) -> None:
        bulk = machine.bulk
        done: dict[tuple[int, int, int], bool] = {}
        calls = each(mask)
        for call in dict.fromkeys(calls):
            cta, at, parity = call
            barrier = bulk.barrier(cta, at)
            complete = barrier.missing == 0 and barrier.bytes == sum(total for *_, total in barrier.landing)
            if barrier.phase & 1 == parity and complete:
                for flat, data, total in barrier.landing:
                    machine.shared.land(flat, data, None)
                    barrier.bytes -= total
                barrier.landing = []
                barrier.settle()
            done[call] = barrier.phase & 1 != parity
        result = np.array([done[call] for call in calls])
        machine.write_lanes(slot, result, mask)
        if not result.any() and mask is None:
            raise PTXError("every thread waits on an mbarrier that nothing will complete")

    def run(mask: Mask) -> None:
        bulk = machine.bulk
        for cta, at, number in each(mask):
            if what == "init":
                bulk.barriers[cta, at] = Barrier(number, number)
                continue
            barrier = bulk.barrier(cta, at)
            if what == "inval":
                if barrier.landing:
                    raise PTXError("mbarrier invalidated while a copy is in flight")
                del bulk.barriers[cta, at]
                continue
            barrier.bytes += number if expects else 0
            if what == "arrive":
                barrier.missing -= 1 if expects else number
                if barrier.missing < 0:
                    raise PTXError("more arrivals at an mbarrier than it counts")
                barrier.settle()

    return wait if waits else run


@builds("cp")
def _copy(instruction: Instruction, machine: Machine) -> Run:
    if instruction.parts[1:2] != ["async"]:
        raise Unsupported(instruction.opcode)
    if instruction.parts[2:3] == ["bulk"]:
        return _bulk_copy(instruction, machine)
    return build_async_copy(instruction, machine)


def _bulk_copy(instruction: Instruction, machine: Machine) -> Run:
    parts = instruction.parts
    if parts[3] == "commit_group":
        return lambda mask: machine.bulk.commit(mask)
    if parts[3] == "wait_group":
        keep = literal(instruction.operands[0])
        return lambda mask: machine.bulk.wait(keep, mask)
    unusual = {"im2col", "multicast::cluster"} & set(parts)
    if parts[3] != "tensor" or unusual or "global" not in parts[4:7]:
        raise Unsupported(instruction.opcode)
    loads = parts[5].startswith("shared")
    local, tensor = instruction.operands[:2] if loads else instruction.operands[1::-1]
    if not isinstance(tensor, TensorAddress):
        raise Unsupported(instruction.opcode)
    values = machine.values
    place = address_of(machine, local)
    handle = address_of(machine, Address(tensor.base), 64)
    corner = [machine.source(item, 32) for item in tensor.coordinates]
    barrier_at = address_of(machine, instruction.operands[2]) if loads else None
    site = machine.stats.site(instruction, "global", "read" if loads else "written")

    def owner(cta: int, count: int) -> Array | None:
        return np.full(count, machine.first_cta + cta) if machine.cta_races else None

    def one(thread: int) -> None:
        bulk, shared = machine.bulk, machine.shared
        cta, at = int(machine.cta_of[thread]), int(handle()[thread])
        if ("global", 0, at) not in bulk.maps:
            raise PTXError(f"no tensor map at {at:#x}")
        tensor_map = bulk.maps["global", 0, at]
        where, inside, size = tensor_map.box([int(values[slot].view(np.int32)[thread]) for slot in corner])
        flat = bulk.shared_layout(tensor_map, int(place()[thread]), where.shape, size, cta)
        addresses, chosen = where.reshape(-1).astype(U64), inside.reshape(-1)
        machine.effective = np.full(len(addresses), thread)
        if barrier_at is not None:
            data = np.zeros((len(addresses), size), np.uint8)
            if chosen.any():
                data[chosen] = machine.memory.load(addresses[chosen], size, owner(cta, int(chosen.sum())))
            shared.begin_copy(flat, size, machine.warp_of[np.full(len(flat), thread)])
            bulk.barrier(cta, int(barrier_at()[thread])).landing.append((flat, data, data.size))
        else:
            data = shared.load_async(flat, size)
            if chosen.any():
                machine.memory.store(addresses[chosen], data[chosen], owner(cta, int(chosen.sum())))
            bulk.stores.setdefault(thread, Queue()).open.append((flat, data))
        site.bytes += int(chosen.sum()) * size
        if machine.stats.profile and chosen.any():
            site.count_rows(where.reshape(1, -1)[:, chosen], size)

    def run(mask: Mask) -> None:
        for thread in machine.threads_of(mask):
            one(int(thread))

    return run
