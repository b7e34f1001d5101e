"""Barriers of a CTA, fences, and instructions that change no result."""

from __future__ import annotations

import numpy as np

from tilewright.aot.emulator.errors import PTXError, Unsupported
from tilewright.aot.emulator.machine import Machine
from tilewright.aot.emulator.program import Instruction
from tilewright.aot.emulator.registry import Mask, Run, builds, literal


@builds("bar", "barrier")
def _barrier(instruction: Instruction, machine: Machine) -> Run:
    if instruction.parts[1] == "warp":
        return lambda mask: None  # what the threads of one warp do is in order here
    form = [part for part in instruction.parts[1:] if part not in ("cta", "aligned")]
    operands = instruction.operands
    if form != ["sync"] or not 1 <= len(operands) <= 2:
        raise Unsupported(f"{instruction.text}: only bar.sync")
    literal(operands[0])
    if len(operands) == 2 and literal(operands[1]) != machine.threads:
        raise Unsupported(f"{instruction.text}: barrier of part of a CTA")

    def run(mask: Mask) -> None:
        if mask is None:
            machine.shared.barrier()
            return
        here = mask.reshape(-1, machine.threads)
        if (here.any(axis=1) & ~here.all(axis=1)).any():
            raise PTXError("bar.sync reached by some threads of a CTA only")
        machine.shared.barrier(np.flatnonzero(here.any(axis=1)))

    return run


@builds("fence")
def _fence(instruction: Instruction, machine: Machine) -> Run:
    if instruction.parts[1:3] != ["proxy", "async"]:
        return lambda mask: None

    def run(mask: Mask) -> None:
        if mask is None:
            machine.shared.fence_proxy()
            return
        warps = np.flatnonzero(mask.reshape(-1, 32).any(axis=1))
        machine.shared.fence_proxy((int(machine.cta_of[32 * warp]), int(machine.warp_of[32 * warp])) for warp in warps)

    return run


@builds("membar", "griddepcontrol", "nanosleep", "setmaxnreg")
def _no_effect(instruction: Instruction, machine: Machine) -> Run:
    return lambda mask: None
