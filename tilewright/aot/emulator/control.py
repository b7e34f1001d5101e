"""Control flow: code cut into blocks, each a straight run of instructions with one way out; asynchronous work."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tilewright.aot.emulator.errors import PTXError
from tilewright.aot.emulator.program import Instruction, Kernel, Symbol
from tilewright.aot.emulator.registry import Run

Work = TypeVar("Work")
_LEAVING = ("bra", "ret", "exit", "trap")


@dataclass(frozen=True)
class Step:
    """A decoded instruction and the register slots that it touches, and those that it writes."""

    run: Run
    instruction: Instruction
    touched: frozenset[int]
    written: frozenset[int]


@dataclass
class Block:
    """A straight run of instructions and the way out of it.

    leaving: what leads to the block numbered ``target``, None where the next one follows; with ``guard`` (a predicate's
    slot) only threads whose predicate says so take it. runs: warps that executed the block. opcodes: what one executes.
    """

    steps: list[Step] = field(default_factory=list)
    leaving: Instruction | None = None
    guard: int | None = None
    negated: bool = False
    target: int = -1
    runs: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)


@dataclass
class Queue(Generic[Work]):
    """Asynchronous work that was not waited for: issued since the last commit, and of each committed group."""

    open: list[Work] = field(default_factory=list)
    closed: list[list[Work]] = field(default_factory=list)

    def commit(self) -> None:
        """Close the current group."""
        self.closed.append(self.open)
        self.open = []


def cut(kernel: Kernel, build: Callable[[Instruction], Step], slot_of: Callable[[str], int]) -> list[Block]:
    """The blocks of a kernel in order; number ``len(blocks)`` is the end of the kernel."""
    code = kernel.code
    targets = {_destination(kernel, instruction) for instruction in code if instruction.parts[0] == "bra"}
    after = {i + 1 for i, instruction in enumerate(code) if instruction.parts[0] in _LEAVING}
    leaders = [i for i in sorted({0} | targets | after) if i < len(code)]
    number = {start: i for i, start in enumerate(leaders)}
    blocks = []
    for start, end in itertools.pairwise([*leaders, len(code)]):
        block, body = Block(), code[start:end]
        last = code[end - 1]
        if last.parts[0] in _LEAVING:
            body = body[:-1]
            block.leaving, block.target = last, len(leaders)
            if last.parts[0] == "bra":
                block.target = number.get(_destination(kernel, last), len(leaders))
            if last.guard is not None:
                block.guard, block.negated = slot_of(last.guard.name), last.guard.negated
        block.steps = [build(instruction) for instruction in body]
        block.opcodes.update(instruction.opcode for instruction in code[start:end])
        blocks.append(block)
    return blocks


def _destination(kernel: Kernel, instruction: Instruction) -> int:
    label = instruction.operands[0]
    if not isinstance(label, Symbol) or label.name not in kernel.labels:
        raise PTXError(f"unknown label at {instruction.where()}")
    return kernel.labels[label.name]
