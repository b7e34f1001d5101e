"""A parsed kernel: operands, instructions, declarations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Width = int | Literal["pred"]


@dataclass(frozen=True)
class Register:
    """A virtual register; ``negated`` marks a predicate source written ``!%p1``."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A literal. ``kind`` is "int", "f32" or "f64"; ``value`` holds the integer, or the bits of the float."""

    value: int
    kind: str = "int"


@dataclass(frozen=True)
class Symbol:
    """A symbol (shared array, parameter, label), a special register such as ``%tid.x``, or the sink ``_``."""

    name: str


@dataclass(frozen=True)
class Vector:
    """A braced operand list ``{a, b, ...}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """A memory operand ``[base + offset]``; ``base`` is None for an absolute address."""

    base: Operand | None
    offset: int = 0


@dataclass(frozen=True)
class TensorAddress:
    """A tensor operand ``[base, {coordinates}]``."""

    base: Operand
    coordinates: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """Two destinations written ``a|b``."""

    first: Operand
    second: Operand


Operand = Register | Immediate | Symbol | Vector | Address | TensorAddress | Pair
SINK = Symbol("_")


@dataclass
class Instruction:
    """One PTX instruction. ``opcode`` is the dotted name, ``parts`` its components, ``guard`` the predicate or None.

    line: in the PTX text. source: "file.py:12", where a ``.loc`` says so.
    """

    opcode: str
    operands: list[Operand]
    guard: Register | None
    line: int
    text: str
    source: str = ""
    parts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = self.opcode.split(".")

    @property
    def kind(self) -> str:
        """The instruction's (last) type."""
        return self.parts[-1]

    def where(self) -> str:
        """Line, source line and text, for messages."""
        at = f" ({self.source})" if self.source else ""
        text = self.text if len(self.text) <= 120 else f"{self.text[:100]} ... {self.text[-16:]}"
        return f"line {self.line}{at}: {text}"


@dataclass
class Kernel:
    """A parsed entry function.

    parameters: names and types in order. registers: width class of each. labels: index into ``code``. shared: alignment
    and bytes of each array, None where the launch gives the size. constants: contents of initialised arrays. local:
    alignment and bytes of the arrays private to each thread. threads: of a CTA, where the text demands a number.
    """

    name: str
    parameters: list[tuple[str, str]]
    registers: dict[str, Width] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    constants: dict[str, bytes] = field(default_factory=dict)
    local: dict[str, tuple[int, int]] = field(default_factory=dict)
    threads: int | None = None
