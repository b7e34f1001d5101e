"""``ldmatrix`` and ``stmatrix``: 8 x 8 matrices of 16-bit elements between shared memory and the registers of a
warp.
"""

from __future__ import annotations

import numpy as np

from tilewright.aot.emulator.addresses import address_of
from tilewright.aot.emulator.errors import Unsupported
from tilewright.aot.emulator.machine import Machine
from tilewright.aot.emulator.numerics import U16, U32
from tilewright.aot.emulator.program import Instruction
from tilewright.aot.emulator.registry import Mask, Run, allow, builds, elements, one_of

_COUNTS = {"x1": 1, "x2": 2, "x4": 4}


@builds("ldmatrix", "stmatrix")
def _matrix(instruction: Instruction, machine: Machine) -> Run:
    """Thread 8 i + r gives the address of row r of matrix i; each thread holds two neighbours of each matrix."""
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
