"""Bulk tensor copies (TMA) and the shared-memory barriers that complete them, as non-specialised Triton kernels use them.

A tensor map made on the device is kept as a Python record beside the memory it lives in. A copy's bytes are in flight from its
issue until a thread waits on its barrier; then they land and the barrier's phase may complete.
"""

# mypy: ignore-errors
# ruff: noqa: D102, D103, E501, B007
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .access import _shared_bits, address
from .memory import PTXError
from .mma import swizzle
from .numerics import U64
from .ops import BUILDERS, Unsupported, builds
from .parser import Addr, Sym

_ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2}
_SWIZZLE_BYTES = {0: 0, 1: 32, 2: 64, 3: 128}


@dataclass
class TensorMap:
    """Fields by name; dimension-indexed ones are dicts. Dimension 0 is the contiguous one, strides are in bytes."""

    values: dict = field(default_factory=dict)

    def set(self, name, index, value):
        if index is None:
            self.values[name] = value
        else:
            self.values.setdefault(name, {})[index] = value

    def copy(self):
        return TensorMap({k: dict(v) if isinstance(v, dict) else v for k, v in self.values.items()})


@dataclass
class Barrier:
    """An mbarrier: arrivals and transaction bytes still missing from the current phase, and that phase's number."""

    count: int
    missing: int
    bytes: int = 0
    phase: int = 0
    landing: list = field(default_factory=list)  # (flat offsets, data, bytes) of copies in flight

    def settle(self):
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.count


class BulkCopies:
    """Tensor maps and barriers of one batch of CTAs."""

    def __init__(self, machine):
        self.machine, self.maps, self.barriers = machine, {}, {}

    def barrier(self, cta, at):
        try:
            return self.barriers[cta, at]
        except KeyError:
            raise PTXError(f"shared address {at:#x} is not an initialised mbarrier") from None

    def box(self, tensor_map, corner):
        """(global addresses, inside) of the elements of a box, contiguous dimension last."""
        v = tensor_map.values
        rank, size = v["rank"] + 1, _ELEMENT_BYTES[v["elemtype"]]
        if v.get("interleave_layout") or v.get("fill_mode") or any(s != 1 for s in v["element_stride"].values()):
            raise Unsupported("tensor map with interleaving, NaN fill or element strides")
        where, inside = np.zeros((1,) * rank, np.int64) + v["global_address"], np.ones((1,) * rank, bool)
        for dim in range(rank):
            index = corner[dim] + np.arange(v["box_dim"][dim])
            shape = [1] * rank
            shape[rank - 1 - dim] = -1
            step = size if dim == 0 else v["global_stride"][dim - 1]
            where = where + index.reshape(shape) * step
            inside = inside & ((index >= 0) & (index < v["global_dim"][dim])).reshape(shape)
        return where, np.broadcast_to(inside, where.shape), size

    def shared_layout(self, tensor_map, start, shape, size, cta):
        """Flat shared offsets of the box's elements, swizzled."""
        inner = shape[-1] * size
        width = _SWIZZLE_BYTES[tensor_map.values["swizzle_mode"]]
        if width and inner > width:
            raise PTXError(f"TMA box of {inner} bytes in a row exceeds its {width}-byte swizzle")
        if start % 128:
            raise PTXError(f"TMA shared address {start:#x} is not aligned to 128 bytes")
        linear = start + np.arange(int(np.prod(shape))) * size
        return self.machine.shared.flat(np.full(linear.size, cta), swizzle(linear, width), size, "bulk access")


@builds("tensormap")
def _tensormap(ins, machine):
    R = machine.registers
    if ins.parts[1] == "replace":
        name = ins.parts[3]
        place = address(machine, ins.operands[0], 64)
        index = ins.operands[1].value if len(ins.operands) == 3 else None
        value = machine.source(ins.operands[-1], 64 if ins.parts[-1] == "b64" else 32)

        def run(mask):
            for thread in machine.threads_of(mask):
                key = ("shared", int(machine.cta_of[thread]), int(place()[thread]))
                machine.bulk.maps.setdefault(key, TensorMap()).set(name, index, int(R[value][thread]))

        return run
    if ins.parts[1] == "cp_fenceproxy":
        target, origin = address(machine, ins.operands[0], 64), address(machine, ins.operands[1], 64)

        def copy(mask):
            machine.effective = mask
            for cta in np.unique(machine.cta_of[machine.threads_of(mask)]):
                thread = (
                    int(cta) * machine.threads
                    if mask is None
                    else int(np.flatnonzero(mask & (machine.cta_of == cta))[0])
                )
                at = int(target()[thread])
                machine.memory.store(
                    np.full(8, at, U64) + np.arange(8, dtype=U64) * U64(16), np.zeros((8, 16), np.uint8)
                )
                machine.bulk.maps["global", at] = machine.bulk.maps.pop(
                    ("shared", int(cta), int(origin()[thread]))
                ).copy()

        return copy
    raise Unsupported(ins.opcode)


@builds("mbarrier")
def _mbarrier(ins, machine):
    R, what = machine.registers, ins.parts[1]
    operands = list(ins.operands)
    destination = None
    if what in ("arrive", "try_wait", "test_wait"):
        destination = operands.pop(0)
    place = address(machine, operands[0], _shared_bits(machine, operands[0]))
    amount = machine.source(operands[1], 32) if len(operands) > 1 else None
    if what in ("try_wait", "test_wait") and "parity" not in ins.parts:
        raise Unsupported(ins.opcode)
    if what == "arrive" and destination != Sym("_"):
        raise Unsupported(ins.opcode + " returning a state")
    slot = machine.target(destination) if what in ("try_wait", "test_wait") else None

    def each(mask):
        for thread in machine.threads_of(mask):
            yield int(machine.cta_of[thread]), int(place()[thread]), int(R[amount][thread]) if amount is not None else 1

    def run(mask):
        bulk = machine.bulk
        if what == "init":
            for cta, at, count in each(mask):
                bulk.barriers[cta, at] = Barrier(count, count)
        elif what == "inval":
            for cta, at, _ in each(mask):
                if bulk.barrier(cta, at).landing:
                    raise PTXError("mbarrier invalidated while a copy is in flight")
                del bulk.barriers[cta, at]
        elif what in ("arrive", "expect_tx"):
            for cta, at, number in each(mask):
                barrier = bulk.barrier(cta, at)
                expects = "expect_tx" in ins.parts
                barrier.bytes += number if expects else 0
                if what == "arrive":
                    barrier.missing -= 1 if expects else number
                    if barrier.missing < 0:
                        raise PTXError("more arrivals at an mbarrier than it counts")
                    barrier.settle()
        elif what in ("try_wait", "test_wait"):
            threads = machine.threads_of(mask)
            done = np.zeros(len(threads), bool)
            cache, before = {}, 0
            for i, (cta, at, parity) in enumerate(each(mask)):
                if (cta, at, parity) not in cache:
                    barrier = bulk.barrier(cta, at)
                    before = barrier.phase & 1
                    if before == parity:
                        for flat, data, total in barrier.landing:
                            machine.shared.land_copy(flat, data, None)
                            barrier.bytes -= total
                        barrier.landing = []
                        barrier.settle()
                    cache[cta, at, parity] = barrier.phase & 1 != parity
                done[i] = cache[cta, at, parity]
            machine.write_lanes(slot, done, mask)
            if not done.any() and mask is None:
                raise PTXError("every thread waits on an mbarrier that nothing will complete")
        else:
            raise Unsupported(ins.opcode)

    return run


_ordinary_cp = BUILDERS["cp"]


@builds("cp")
def _cp(ins, machine):
    if ins.parts[2:3] != ["bulk"]:
        return _ordinary_cp(ins, machine)
    if ins.parts[3] in ("commit_group", "wait_group"):
        return lambda mask: None  # stores are done at once
    if (
        ins.parts[3] != "tensor"
        or "im2col" in ins.parts
        or "multicast::cluster" in ins.parts
        or "global" not in ins.parts[4:7]
    ):
        raise Unsupported(ins.opcode)
    loads = ins.parts[5].startswith("shared")
    tensor, local = (ins.operands[1], ins.operands[0]) if loads else (ins.operands[0], ins.operands[1])
    R = machine.registers
    place = address(machine, local, _shared_bits(machine, local))
    handle = address(machine, Addr(tensor.base), 64)
    corner = [machine.source(item, 32) for item in tensor.coordinates]
    barrier_at = address(machine, ins.operands[2], _shared_bits(machine, ins.operands[2])) if loads else None

    def run(mask):
        bulk, shared = machine.bulk, machine.shared
        for thread in machine.threads_of(mask):
            cta = int(machine.cta_of[thread])
            at = int(handle()[thread])
            if ("global", at) not in bulk.maps:
                raise PTXError(f"no tensor map at {at:#x}")
            tensor_map = bulk.maps["global", at]
            where, inside, size = bulk.box(tensor_map, [int(R[s].view(np.int32)[thread]) for s in corner])
            flat = bulk.shared_layout(tensor_map, int(place()[thread]), where.shape, size, cta)
            addresses, inside = where.reshape(-1).astype(U64), inside.reshape(-1)
            machine.effective = np.full(len(addresses), thread)
            if loads:
                data = np.zeros((len(addresses), size), np.uint8)
                if inside.any():
                    data[inside] = machine.memory.load(addresses[inside], size)
                machine.stats.global_bytes["read"] += int(inside.sum()) * size
                shared.begin_copy(flat, size, machine.warp_of[np.full(len(flat), thread)])
                bulk.barrier(cta, int(barrier_at()[thread])).landing.append((flat, data, data.size))
            else:
                data = shared.async_load(flat, size)
                if inside.any():
                    machine.memory.store(addresses[inside], data[inside])
                machine.stats.global_bytes["written"] += int(inside.sum()) * size

    return run
