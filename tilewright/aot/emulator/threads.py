"""Threads together: what those of a warp exchange (shuffles, votes, matches, reductions), barriers of a CTA and fences.

The threads that execute an exchange must be those that its member mask names; anything else is undefined on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.aot.emulator.errors import PTXError, Unsupported
from tilewright.aot.emulator.machine import Machine
from tilewright.aot.emulator.numerics import U32, Array, bits_of, decode, encode, limits
from tilewright.aot.emulator.program import Immediate, Instruction, Operand
from tilewright.aot.emulator.registry import Function, Mask, Run, allow, both, builds, literal, one_of

_LANE = np.arange(32)
_WEIGHT = U32(1) << np.arange(32, dtype=U32)


def _members(instruction: Instruction, machine: Machine, operand: Operand) -> Callable[[Mask], Array]:
    """A function from the mask to the active threads [warps, 32], checked against the member mask."""
    slot, values = machine.source(operand, 32), machine.values
    name = instruction.parts[0]
    everyone = isinstance(operand, Immediate) and operand.value & 0xFFFFFFFF == 0xFFFFFFFF

    def active(mask: Mask) -> Array:
        if mask is None and everyone:
            return np.ones((machine.lanes // 32, 32), bool)
        here = np.ones((machine.lanes // 32, 32), bool) if mask is None else mask.reshape(-1, 32)
        named = values[slot].reshape(-1, 32)
        word = (here * _WEIGHT).sum(axis=1, dtype=U32)
        wrong = here & (named != word[:, None])
        if wrong.any():
            warp, lane = np.argwhere(wrong)[0]
            machine.effective = None
            raise PTXError(
                f"{name} executed by some threads of its warp only: {int(word[warp]):#010x}, member mask "
                f"{int(named[warp, lane]):#010x}",
                int(32 * warp + lane),
            )
        return here

    return active


@builds("shfl")
def _shuffle(instruction: Instruction, machine: Machine) -> Run:
    allow(instruction, "sync", "up", "down", "bfly", "idx")
    mode = instruction.parts[2]
    if instruction.parts[1] != "sync" or instruction.kind != "b32":
        raise Unsupported(instruction.opcode)
    slot, inside = both(machine, instruction.operands[0])
    a, b, c = (machine.source(op, 32) for op in instruction.operands[1:4])
    members, values = _members(instruction, machine, instruction.operands[4]), machine.values

    def run(mask: Mask) -> None:
        here = members(mask)
        value = values[a].reshape(-1, 32)
        amount, control = (values[s].reshape(-1, 32).astype(np.int64) for s in (b, c))
        amount = amount & 31
        clamp, segment = control & 31, (control >> 8) & 31
        low = _LANE & segment
        limit = low | clamp & ~segment
        if mode == "up":
            source = _LANE - amount
            valid = source >= limit
        else:
            source = {"down": _LANE + amount, "bfly": _LANE ^ amount, "idx": low | amount & ~segment}[mode]
            valid = source <= limit
        source = np.where(valid, source, _LANE)
        if mask is not None and (here & ~np.take_along_axis(here, source, axis=1)).any():
            raise PTXError("shfl reads from a thread that does not take part")
        machine.write(slot, np.take_along_axis(value, source, axis=1).astype(U32).reshape(-1), mask)
        machine.write(inside, valid.reshape(-1), mask)

    return run


@builds("vote")
def _vote(instruction: Instruction, machine: Machine) -> Run:
    allow(instruction, "sync", "ballot", "any", "all", "uni")
    mode = instruction.parts[2]
    slot, source = machine.target(instruction.operands[0]), machine.predicate(instruction.operands[1])
    members = _members(instruction, machine, instruction.operands[2])

    def run(mask: Mask) -> None:
        here, said = members(mask), source().reshape(-1, 32)
        some, every = (here & said).any(axis=1), (~here | said).all(axis=1)
        if mode == "ballot":
            result = ((here & said) * _WEIGHT).sum(axis=1, dtype=U32)
        else:
            result = {"any": some, "all": every, "uni": every | ~some}[mode]
        machine.write(slot, np.repeat(result, 32), mask)

    return run


@builds("match")
def _match(instruction: Instruction, machine: Machine) -> Run:
    """``any``: the threads with my value. ``all``: every thread if all have the same value, and whether so."""
    allow(instruction, "any", "all", "sync")
    every = "all" in instruction.parts
    slot, agree = both(machine, instruction.operands[0])
    source, values = machine.source(instruction.operands[1], bits_of(instruction.kind)), machine.values
    members = _members(instruction, machine, instruction.operands[2])

    def run(mask: Mask) -> None:
        here, value = members(mask), values[source].reshape(-1, 32)
        same = (value[:, :, None] == value[:, None, :]) & here[:, None, :]
        if every:
            agreed = (same.sum(axis=2) == here.sum(axis=1)[:, None]) & here
            same = same & agreed[:, :, None]
            machine.write(agree, agreed.reshape(-1), mask)
        machine.write(slot, (same * _WEIGHT).sum(axis=2, dtype=U32).reshape(-1), mask)

    return run


@builds("activemask")
def _activemask(instruction: Instruction, machine: Machine) -> Run:
    slot = machine.target(instruction.operands[0])

    def run(mask: Mask) -> None:
        on = np.ones(machine.lanes, bool) if mask is None else mask
        machine.write(slot, np.repeat((on.reshape(-1, 32) * _WEIGHT).sum(axis=1, dtype=U32), 32), mask)

    return run


_REDUCTIONS: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@builds("redux")
def _reduce(instruction: Instruction, machine: Machine) -> Run:
    allow(instruction, "sync", *_REDUCTIONS)
    operation, kind = one_of(instruction, _REDUCTIONS), instruction.kind
    if not operation or kind not in ("s32", "u32", "b32"):
        raise Unsupported(instruction.opcode)
    reduce: Function = _REDUCTIONS[operation].reduce
    neutral = {"min": limits(kind)[1], "max": limits(kind)[0], "and": (1 << 32) - 1}.get(operation, 0)
    slot, source = machine.target(instruction.operands[0]), machine.source(instruction.operands[1], 32)
    members, values = _members(instruction, machine, instruction.operands[2]), machine.values

    def run(mask: Mask) -> None:
        numbers = decode(values[source], kind).reshape(-1, 32)
        numbers = np.where(members(mask), numbers.astype(np.int64), neutral)
        result = encode((reduce(numbers, axis=1) & 0xFFFFFFFF).astype(U32), "u32")
        machine.write(slot, np.repeat(result, 32), mask)

    return run


@builds("elect")
def _elect(instruction: Instruction, machine: Machine) -> Run:
    """The first thread that takes part leads."""
    slot, chosen = both(machine, instruction.operands[0])
    if chosen is None:
        raise Unsupported(instruction.opcode)
    members = _members(instruction, machine, instruction.operands[1])

    def run(mask: Mask) -> None:
        first = members(mask).argmax(axis=1)
        machine.write(slot, np.repeat(first, 32).astype(U32), mask)
        machine.write(chosen, (first[:, None] == _LANE).reshape(-1), mask)

    return run


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
