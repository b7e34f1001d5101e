"""How instructions are implemented: builders, found by the first part of the opcode.

A builder ``build(instruction, machine)`` decodes one instruction once and returns ``run(mask)``, which executes it for
every thread of the batch (``mask is None``) or for those where ``mask`` is true.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tilewright.aot.emulator.errors import Unsupported
from tilewright.aot.emulator.numerics import FLOATS, Array, bits_of, decode, encode, flush
from tilewright.aot.emulator.program import SINK, Immediate, Instruction, Operand, Pair, Vector, Width

if TYPE_CHECKING:
    from tilewright.aot.emulator.machine import Machine

Mask = Array | None
Run = Callable[[Mask], None]
Builder = Callable[[Instruction, "Machine"], Run]
Function = Callable[..., Array]
BuilderType = TypeVar("BuilderType", bound=Builder)

BUILDERS: dict[str, Builder] = {}
ROUNDINGS = ("rn", "rz", "rm", "rp")


def builds(*names: str) -> Callable[[BuilderType], BuilderType]:
    """Register a builder for the opcodes that start with one of ``names``."""

    def register(builder: BuilderType) -> BuilderType:
        for name in names:
            BUILDERS[name] = builder
        return builder

    return register


def allow(instruction: Instruction, *modifiers: str) -> None:
    """Refuse an instruction with a modifier that is not listed: what is not known must not be ignored."""
    unknown = set(instruction.parts[1:-1]) - set(modifiers)
    if unknown:
        raise Unsupported(f"{instruction.opcode}: {', '.join(sorted(unknown))}")


def one_of(instruction: Instruction, choices: Collection[str], default: str = "") -> str:
    """The first part of the opcode that is among ``choices``."""
    return next((part for part in instruction.parts[1:] if part in choices), default)


def elements(operand: Operand) -> list[Operand]:
    """The operands in braces, or the single one."""
    return list(operand.items) if isinstance(operand, Vector) else [operand]


def literal(operand: Operand) -> int:
    """The value of an operand that must be an integer literal."""
    if not isinstance(operand, Immediate):
        raise Unsupported(f"{operand} where a literal is expected")
    return operand.value


def slot_of(machine: Machine, operand: Operand | None) -> int | None:
    """The slot of a destination, None where there is none or its value is thrown away."""
    return None if operand is None or operand == SINK else machine.target(operand)


def both(machine: Machine, operand: Operand) -> tuple[int | None, int | None]:
    """The slots of the destinations ``d`` or ``d|p``."""
    first, second = (operand.first, operand.second) if isinstance(operand, Pair) else (operand, None)
    return slot_of(machine, first), slot_of(machine, second)


def compute(machine: Machine, destination: int, function: Function, sources: Sequence[int]) -> Run:
    """``destination = function(*sources)`` on register slots."""
    values = machine.values

    def run(mask: Mask) -> None:
        machine.write(destination, function(*[values[source] for source in sources]), mask)

    return run


def numeric(
    instruction: Instruction,
    machine: Machine,
    function: Function,
    kind: str,
    result: str | None = None,
    source_kinds: Sequence[str] | None = None,
) -> Run:
    """``function`` on numbers of type ``kind``, with the instruction's rounding, ``.ftz`` and ``.sat``.

    result: the destination's type where it differs. source_kinds: types of the sources where they differ.
    """
    target = result or kind
    kinds = source_kinds or [kind] * (len(instruction.operands) - 1)
    sources = [machine.source(op, bits_of(k)) for op, k in zip(instruction.operands[1:], kinds, strict=True)]
    ftz = "ftz" in instruction.parts
    saturate = "sat" in instruction.parts
    rounding = one_of(instruction, ROUNDINGS, "rn")
    if rounding != "rn" and kind != "f32":
        raise Unsupported(f"{instruction.opcode}: directed rounding of {kind}")
    if saturate and kind not in FLOATS:
        raise Unsupported(f"{instruction.opcode}: saturating integers")
    plain = not ftz and not saturate and rounding == "rn"

    def on_words(*raw: Array) -> Array:
        numbers = [decode(r, k) for r, k in zip(raw, kinds, strict=True)]
        if plain:
            return encode(function(*numbers), target)
        if ftz:
            numbers = [flush(n, kind) for n in numbers]
        value = np.asarray(function(*numbers))
        if saturate:
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1) + 0.0)
        word = encode(value, target, rounding)
        return encode(flush(decode(word, target), kind), target) if ftz else word

    return compute(machine, machine.target(instruction.operands[0]), on_words, sources)


def bitwise(instruction: Instruction, machine: Machine, function: Function, *widths: Width) -> Run:
    """``function`` on raw words of so many bits (or "pred"): one width for all sources, or one for each."""
    operands = instruction.operands[1:]
    each = widths * len(operands) if len(widths) == 1 else widths
    sources = [machine.source(op, width) for op, width in zip(operands, each, strict=True)]
    return compute(machine, machine.target(instruction.operands[0]), function, sources)
