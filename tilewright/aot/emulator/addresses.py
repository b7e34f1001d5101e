"""Memory operands, and what loads, stores and atomics have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tilewright.aot.emulator.errors import Unsupported
from tilewright.aot.emulator.numerics import WORD, Array
from tilewright.aot.emulator.program import Address, Immediate, Instruction, Operand, Width

if TYPE_CHECKING:
    from tilewright.aot.emulator.machine import Machine

#: Modifiers that say nothing about what is moved.
HINTS = {
    *("weak", "relaxed", "acquire", "release", "acq_rel", "volatile", "mmio", "noftz"),
    *("cta", "gpu", "sys", "cluster"),
    *("global", "shared", "shared::cta", "param", "local"),
    *("nc", "ca", "cg", "cs", "cv", "lu", "wb", "wt"),
    *(f"L1::{name}" for name in ("evict_last", "evict_first", "no_allocate", "evict_normal", "evict_unchanged")),
    *(f"L2::{name}" for name in ("cache_hint", "evict_last", "evict_first", "64B", "128B", "256B")),
    *("v2", "v4"),
}


def space_of(instruction: Instruction) -> str:
    """The address space that an instruction names, else "generic"."""
    for name in ("global", "shared", "shared::cta", "param", "local", "const"):
        if name in instruction.parts:
            return name.split("::")[0]
    return "generic"


def vector_of(instruction: Instruction) -> int:
    """Elements that a load, store or atomic moves for each thread."""
    return 4 if "v4" in instruction.parts else 2 if "v2" in instruction.parts else 1


def address_of(machine: Machine, operand: Operand, width: Width | None = None) -> Callable[[], Array]:
    """A function giving every thread's address for a memory operand.

    width: of the address; by default the register's, or 32: shared addresses may be held in registers of either width.
    """
    if not isinstance(operand, Address):
        raise Unsupported(f"memory operand {operand}")
    width = width or machine.width(operand.base) or 32
    values, offset = machine.values, operand.offset
    if operand.base is None:
        slot, offset = machine.source(Immediate(operand.offset), width), 0
    else:
        slot = machine.source(operand.base, width)
    if not offset:
        return lambda: values[slot]
    shift = WORD[width](offset & (1 << int(width)) - 1)
    return lambda: values[slot] + shift


def active(values: Array, mask: Array | None) -> Array:
    """The values of the active threads."""
    return values if mask is None else values[mask]
