"""Comparisons and selections of single threads."""

from __future__ import annotations

import numpy as np

from tilewright.aot.emulator.errors import Unsupported
from tilewright.aot.emulator.machine import Machine
from tilewright.aot.emulator.numerics import FLOATS, Array, bits_of, decode, flush
from tilewright.aot.emulator.program import Instruction
from tilewright.aot.emulator.registry import Function, Mask, Run, allow, bitwise, both, builds, one_of

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    **dict.fromkeys(("lt", "lo"), np.less),
    **dict.fromkeys(("le", "ls"), np.less_equal),
    **dict.fromkeys(("gt", "hi"), np.greater),
    **dict.fromkeys(("ge", "hs"), np.greater_equal),
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


def _comparison(name: str, kind: str) -> Function:
    """The function of two arrays of numbers that ``name`` stands for; an ordered one is false where a NaN is."""
    if kind not in FLOATS:
        return _COMPARE[name]
    if name in ("num", "nan"):
        return _unordered if name == "nan" else (lambda a, b: ~_unordered(a, b))
    if name == "ne":
        return lambda a, b: (a != b) & ~_unordered(a, b)
    if name.endswith("u") and name[:-1] in _COMPARE:
        ordered = _COMPARE[name[:-1]]
        return lambda a, b: ordered(a, b) | _unordered(a, b)
    return _COMPARE[name]


@builds("setp")
def _setp(instruction: Instruction, machine: Machine) -> Run:
    kind = instruction.kind
    name, combination = instruction.parts[1], one_of(instruction, _COMBINE)
    allow(instruction, name, *_COMBINE, "ftz")
    compare = _comparison(name, kind)
    targets = both(machine, instruction.operands[0])
    a, b = (machine.source(op, bits_of(kind)) for op in instruction.operands[1:3])
    other = machine.predicate(instruction.operands[3]) if combination else None
    packed = kind.endswith("x2")
    if packed and (targets[1] is None or combination):
        raise Unsupported(instruction.opcode)
    ftz = "ftz" in instruction.parts
    values = machine.values

    def run(mask: Mask) -> None:
        left, right = decode(values[a], kind), decode(values[b], kind)
        if ftz:
            left, right = flush(left, kind), flush(right, kind)
        answer = compare(left, right)
        answers = answer.reshape(-1, 2).T if packed else (answer, ~answer)
        for target, result in zip(targets, answers, strict=True):
            result = np.ascontiguousarray(result)
            machine.write(target, _COMBINE[combination](result, other()) if other else result, mask)

    return run


@builds("selp")
def _selp(instruction: Instruction, machine: Machine) -> Run:
    allow(instruction)
    bits = bits_of(instruction.kind)

    def function(a: Array, b: Array, p: Array) -> Array:
        return np.where(p, a, b)

    return bitwise(instruction, machine, function, bits, bits, "pred")
