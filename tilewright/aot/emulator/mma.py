"""``mma.sync`` and ``mma.sp``: products of small matrices held in the registers of a warp."""

from __future__ import annotations

import re

import numpy as np

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
    numbers,
    order_of,
    read_accumulator,
    split,
    write_accumulator,
)
from tilewright.aot.emulator.machine import Machine
from tilewright.aot.emulator.numerics import Array
from tilewright.aot.emulator.program import Instruction
from tilewright.aot.emulator.registry import Mask, Run, builds, elements, literal

_SPARSE = ("sp", "sp::ordered_metadata")
_OTHER = {"sync", "aligned", "row", "col", "satfinite", *_SPARSE}


@builds("mma")
def _mma(instruction: Instruction, machine: Machine) -> Run:
    parts = instruction.parts[1:]
    sparse, ordered = parts[0] in _SPARSE, parts[0] == "sp::ordered_metadata"
    shape = next((match for part in parts if (match := re.fullmatch(r"m16n8k(\d+)", part))), None)
    kinds = [part for part in parts if part in (*ELEMENTS, *ACCUMULATORS)]
    if shape is None or len(kinds) != 4 or set(parts) - _OTHER - set(kinds) - {shape[0]}:
        raise Unsupported(instruction.opcode)
    d_kind, a_kind, b_kind, c_kind = kinds
    groups = [elements(operand) for operand in instruction.operands[:4]]
    e, k = ELEMENTS.get(a_kind, 0), int(shape[1])
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
