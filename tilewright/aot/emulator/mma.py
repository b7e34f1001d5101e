"""``ldmatrix``, ``stmatrix``, ``mma.sync`` and ``mma.sp``: small matrices in the registers of a warp."""

from __future__ import annotations

import numpy as np

from tilewright.aot.emulator.addresses import address_of
from tilewright.aot.emulator.errors import Unsupported
from tilewright.aot.emulator.fragments import (
    ACCUMULATORS,
    ELEMENTS,
    a_index,
    accumulate,
    arrange,
    b_index,
    c_index,
    decompress,
    form_of,
    numbers,
    order_of,
    read_accumulator,
    split,
    write_accumulator,
)
from tilewright.aot.emulator.machine import Machine
from tilewright.aot.emulator.numerics import U16, U32, Array
from tilewright.aot.emulator.program import Instruction
from tilewright.aot.emulator.registry import Mask, Run, allow, builds, elements, literal, one_of

_SPARSE = ("sp", "sp::ordered_metadata")
_OTHER = {"sync", "aligned", "row", "col", "satfinite", *_SPARSE}
_COUNTS = {"x1": 1, "x2": 2, "x4": 4}


@builds("ldmatrix", "stmatrix")
def _move(instruction: Instruction, machine: Machine) -> Run:
    """8 x 8 matrices of 16-bit elements: thread 8 i + r gives the address of row r of matrix i, and holds two
    neighbours of each matrix.
    """
    allow(instruction, "sync", "aligned", "m8n8", "trans", "shared", "shared::cta", *_COUNTS)
    count = _COUNTS.get(one_of(instruction, _COUNTS), 0)
    if "m8n8" not in instruction.parts or instruction.kind != "b16" or not count:
        raise Unsupported(instruction.opcode)
    load, transposed = instruction.parts[0] == "ldmatrix", "trans" in instruction.parts
    registers, where = instruction.operands if load else reversed(instruction.operands)
    items = elements(registers)
    if len(items) != count:
        raise Unsupported(f"{instruction.opcode}: {len(items)} registers for {count} matrices")
    slots = [machine.target(item) if load else machine.source(item, 32) for item in items]
    place, values = address_of(machine, where), machine.values
    site = machine.stats.site(instruction, "shared", "read" if load else "written")

    def run(mask: Mask) -> None:
        warps = machine.full_warps(mask, instruction.parts[0])
        rows = place().reshape(-1, 32)[warps, : 8 * count]
        threads = np.arange(machine.lanes).reshape(-1, 32)[warps, : 8 * count].reshape(-1)
        machine.effective = threads
        flat = machine.shared.flat(machine.cta_of[threads], rows.reshape(-1), 16, "row access")
        warp = machine.warp_of[threads]
        site.accesses += len(rows)
        site.bytes += 16 * rows.size
        site.count_phases(rows.reshape(-1, 8), 16)
        if load:
            data = machine.shared.load(flat, 16, warp).reshape(len(rows), count, 8, 16)
            if transposed:
                data = np.ascontiguousarray(data.view(U16).transpose(0, 1, 3, 2))
            fragments = data.view(U32).reshape(len(rows), count, 32)
            for i, slot in enumerate(slots):
                machine.write_lanes(slot, fragments[:, i].reshape(-1), mask)
            return
        held = np.stack([values[slot].reshape(-1, 32)[warps] for slot in slots], axis=1)
        data = np.ascontiguousarray(held.reshape(len(rows), count, 8, 4)).view(U16)
        if transposed:
            data = np.ascontiguousarray(data.transpose(0, 1, 3, 2))
        machine.shared.store(flat, np.ascontiguousarray(data).view(np.uint8).reshape(-1, 16), warp)

    return run


@builds("mma")
def _mma(instruction: Instruction, machine: Machine) -> Run:
    parts = instruction.parts[1:]
    sparse, ordered = parts[0] in _SPARSE, parts[0] == "sp::ordered_metadata"
    (k,), (d_kind, a_kind, b_kind, c_kind) = form_of(instruction, r"m16n8k(\d+)", 4, _OTHER)
    groups = [elements(operand) for operand in instruction.operands[:4]]
    e = ELEMENTS.get(a_kind, 0)
    a_count, b_count, stored_k = len(groups[1]), len(groups[2]), k // 2 if sparse else k
    integer = d_kind == "s32"
    fits = (
        d_kind == c_kind
        and d_kind in ACCUMULATORS
        and ELEMENTS.get(b_kind) == e
        and integer == (a_kind in ("s8", "u8"))
        and (a_count * 2 * e, b_count * 4 * e) == (stored_k, k)
        and parts.count("row") == parts.count("col") == 1
        and not (sparse and e == 1)
    )
    if not fits:
        raise Unsupported(instruction.opcode)
    d = [machine.target(item) for item in groups[0]]
    a, b, c = ([machine.source(item, 32) for item in group] for group in groups[1:])
    metadata = machine.source(instruction.operands[4], 32) if sparse else None
    selector = literal(instruction.operands[5]) if sparse else 0
    saturate = "satfinite" in parts
    order_a, order_b, order_c = order_of(a_index(a_count, e)), order_of(b_index(b_count, e)), order_of(c_index())
    flat_c = c_index().reshape(-1)
    values, kind = machine.values, "mma.sp" if sparse else "mma.sync"

    def fragment(slots: list[int], warps: slice | Array) -> Array:
        held: Array = np.stack([values[slot] for slot in slots], axis=1).reshape(-1, 32, len(slots))[warps]
        return held

    def run(mask: Mask) -> None:
        warps = machine.full_warps(mask, "mma")
        left = numbers(arrange(split(fragment(a, warps), a_kind), order_a, (16, stored_k)), a_kind)
        right = numbers(arrange(split(fragment(b, warps), b_kind), order_b, (k, 8)), b_kind)
        initial = arrange(read_accumulator(fragment(c, warps), c_kind), order_c, (16, 8))
        if metadata is not None:
            left = decompress(left, values[metadata].reshape(-1, 32)[warps], a_kind, k, selector, ordered)
        result = accumulate(left, right, initial, integer, saturate).reshape(-1, 128)[:, flat_c].reshape(-1, 32, 4)
        packed = write_accumulator(result, d_kind)
        for i, slot in enumerate(d):
            machine.write_lanes(slot, packed[:, :, i].reshape(-1), mask)
        machine.stats.matrix[kind] += len(left)
        machine.stats.matrix_flops += 2 * 16 * 8 * k * len(left)

    return run
