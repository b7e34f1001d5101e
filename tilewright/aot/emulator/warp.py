"""Instructions in which the threads of a warp or a CTA act together: shuffles, votes, barriers, fences."""

# mypy: ignore-errors
# ruff: noqa: D102, D103, E501, B007
from __future__ import annotations

import numpy as np

from .memory import PTXError
from .numerics import U32, decode, encode
from .ops import Unsupported, builds
from .parser import Pair, Sym


@builds("shfl")
def _shfl(ins, machine):
    if ins.parts[1] != "sync" or ins.parts[-1] != "b32":
        raise Unsupported(ins.opcode)
    mode = ins.parts[2]
    first = ins.operands[0].first if isinstance(ins.operands[0], Pair) else ins.operands[0]
    slot = None if first == Sym("_") else machine.target(first)
    inside = machine.target(ins.operands[0].second) if isinstance(ins.operands[0], Pair) else None
    a, b, c = (machine.source(op, 32) for op in ins.operands[1:4])
    R = machine.registers
    lane = np.arange(32)

    def run(mask):
        warps = machine.full_warps(mask, "shfl.sync")
        value, amount, control = (R[s].reshape(-1, 32)[warps].astype(np.int64) for s in (a, b, c))
        amount = amount & 31
        clamp, segment = control & 31, (control >> 8) & 31
        low = lane & segment
        limit = low | clamp & ~segment
        if mode == "up":
            source = lane - amount
            valid = source >= limit
        elif mode == "down":
            source = lane + amount
            valid = source <= limit
        elif mode == "bfly":
            source = lane ^ amount
            valid = source <= limit
        else:
            source = low | amount & ~segment
            valid = source <= limit
        source = np.where(valid, source, lane)
        if slot is not None:
            machine.write_warps(slot, np.take_along_axis(value, source, axis=1).astype(U32), mask, warps)
        if inside is not None:
            machine.write_warps(inside, valid, mask, warps)

    return run


@builds("vote")
def _vote(ins, machine):
    mode = next((p for p in ins.parts if p in ("ballot", "any", "all", "uni")), None)
    if mode is None:
        raise Unsupported(ins.opcode)
    slot, source = machine.target(ins.operands[0]), machine.source(ins.operands[1], "pred")
    R = machine.registers
    weight = U32(1) << np.arange(32, dtype=U32)

    def run(mask):
        warps = machine.full_warps(mask, "vote.sync")
        p = R[source].reshape(-1, 32)[warps]
        result = {
            "ballot": lambda: (p * weight).sum(1, dtype=U32),
            "any": lambda: p.any(1),
            "all": lambda: p.all(1),
            "uni": lambda: p.all(1) | ~p.any(1),
        }[mode]()
        machine.write_warps(slot, np.repeat(result[:, None], 32, axis=1), mask, warps)

    return run


@builds("activemask")
def _activemask(ins, machine):
    slot = machine.target(ins.operands[0])
    weight = U32(1) << np.arange(32, dtype=U32)

    def run(mask):
        on = np.ones(machine.lanes, bool) if mask is None else mask
        word = (on.reshape(-1, 32) * weight).sum(1, dtype=U32)
        machine.write(slot, np.repeat(word, 32), mask)

    return run


@builds("redux")
def _redux(ins, machine):
    operation, kind = ins.parts[2], ins.parts[-1]
    reduce = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }.get(operation)
    if reduce is None:
        raise Unsupported(ins.opcode)
    slot, source = machine.target(ins.operands[0]), machine.source(ins.operands[1], 32)
    R = machine.registers

    def run(mask):
        warps = machine.full_warps(mask, "redux.sync")
        values = decode(R[source], kind).reshape(-1, 32)[warps]
        result = encode(reduce.reduce(values, axis=1), kind)
        machine.write_warps(slot, np.repeat(result[:, None], 32, axis=1), mask, warps)

    return run


@builds("elect")
def _elect(ins, machine):
    pair = ins.operands[0]
    leader, chosen = pair.first, pair.second
    slot = None if leader == Sym("_") else machine.target(leader)
    flag = machine.target(chosen)

    def run(mask):
        warps = machine.full_warps(mask, "elect.sync")
        count = len(np.arange(machine.lanes // 32)[warps])
        if slot is not None:
            machine.write_warps(slot, np.zeros((count, 32), U32), mask, warps)
        machine.write_warps(flag, np.tile(np.arange(32) == 0, (count, 1)), mask, warps)

    return run


@builds("bar", "barrier")
def _bar(ins, machine):
    if ins.parts[1] == "warp":
        return lambda mask: None
    form = [p for p in ins.parts[1:] if p != "cta"]
    if form[0] not in ("sync",) or ins.operands[0] != ins.operands[0].__class__(0) or len(ins.operands) > 2:
        raise Unsupported(f"{ins.text}: only the CTA-wide barrier 0")
    if len(ins.operands) == 2 and ins.operands[1].value != machine.threads:
        raise Unsupported(f"{ins.text}: barrier of part of a CTA")

    def run(mask):
        if mask is None:
            machine.shared.barrier()
            return
        here = mask.reshape(-1, machine.threads)
        if (here.any(1) & ~here.all(1)).any():
            raise PTXError("bar.sync reached by some threads of a CTA only")
        machine.shared.barrier(np.flatnonzero(here.any(1)))

    return run


@builds("fence")
def _fence(ins, machine):
    if ins.parts[1:3] != ["proxy", "async"]:
        return lambda mask: None

    def run(mask):
        machine.shared.fence_proxy(None if mask is None else np.unique(machine.cta_of[mask]))

    return run


@builds("membar", "griddepcontrol", "nanosleep", "setmaxnreg")
def _no_effect(ins, machine):
    return lambda mask: None
