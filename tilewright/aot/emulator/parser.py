"""PTX text -> a flat list of decoded statements of one kernel.

Only the subset of the grammar that a compiler emits is understood: one ``.entry`` function, register declarations
(also inside nested ``{ }`` scopes of inline assembly), labels, and predicated instructions. Debug sections, ``.loc``
and ``.file`` lines are dropped, but the source line of each instruction is kept for messages.
"""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import dataclass, field

from tilewright.aot.emulator.errors import PTXSyntaxError, Unsupported
from tilewright.aot.emulator.program import (
    SINK,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Operand,
    Pair,
    Register,
    Symbol,
    TensorAddress,
    Vector,
    Width,
)

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_LABEL = re.compile(r"([$A-Za-z_][\w$.]*)\s*:(?!:)")
_ARRAY = re.compile(r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.b8\s+([\w$]+)\s*\[\s*(\d*)\s*\]\s*;")
_CONSTANT = re.compile(
    r"\.(?:global|const)\s+(?:\.align\s+\d+\s+)?\.[bu](8|16|32|64)\s+([\w$]+)\s*\[\s*(\d+)\s*\]\s*=\s*\{([^}]*)\}"
)
_DECLARED = re.compile(r"([%\w$]+)(?:<(\d+)>)?$")
_OPCODE = re.compile(r"[a-z][\w.:]*")
_SPECIAL = re.compile(
    r"%(?:tid|ntid|ctaid|nctaid|laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock64|globaltimer|"
    r"cluster_ctaid|cluster_nctaid|clusterid|nclusterid|cluster_ctarank|cluster_nctarank|lanemask_\w+|"
    r"dynamic_smem_size|total_smem_size)\b(?:\.[xyzw])?$"
)
_WIDTHS: dict[str, Width] = {
    "pred": "pred",
    **dict.fromkeys(("b8", "u8", "s8", "b16", "u16", "s16", "f16"), 16),
    **dict.fromkeys(("b32", "u32", "s32", "f32"), 32),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 64),
}
Scopes = list[dict[str, str]]


@functools.lru_cache(maxsize=8)
def parse(ptx: str) -> Kernel:
    """Parse the only ``.entry`` in ``ptx``; the kernel is shared between calls and must not be changed.

    Raises PTXSyntaxError where there is none or more than one, and Unsupported for calls of device functions.
    """
    text = _COMMENT.sub(lambda match: "\n" * match.group().count("\n"), ptx)
    text, source_at = _take_debug_lines(text)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(", text))
    if len(entries) != 1:
        raise PTXSyntaxError(f"expected exactly one .entry, found {len(entries)}")
    called = re.search(r"(?:^|[;{}])\s*call\b[^;]*?([A-Za-z_]\w+)\s*,", text, re.M)
    if called or re.search(r"^\s*(?:\.visible\s+|\.weak\s+)?\.func\b", text, re.M):
        name = called[1] if called else ".func"
        raise Unsupported(f"calls of device functions, such as device_print and device_assert make: {name}")
    entry = entries[0]
    close = text.index(")", entry.end())
    declared = [item.split() for item in text[entry.end() : close].split(",") if item.strip()]
    start = text.index("{", close)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", text[close:start])
    kernel = Kernel(
        entry[1],
        [(words[-1], words[1].lstrip(".")) for words in declared],
        threads=int(threads[1]) if threads else None,
    )
    for space, alignment, name, size in _ARRAY.findall(text):
        if space == "shared":
            kernel.shared[name] = (int(alignment or 1), int(size) if size else None)
        else:
            kernel.local[name] = (int(alignment or 1), int(size))
    for width, name, count, values in _CONSTANT.findall(text):
        size = int(width) // 8
        data = b"".join((integer(v.strip()) % (1 << int(width))).to_bytes(size, "little") for v in values.split(","))
        kernel.constants[name] = data.ljust(int(count) * size, b"\0")
    _Body(text, kernel, source_at).read(start + 1)
    return kernel


def _take_debug_lines(text: str) -> tuple[str, dict[int, str]]:
    """The text without its debug lines, and the source line that is current at each line of it."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M))
    source_at, current = {}, ""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        location = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line)
        if location:
            current = f"{files.get(location[1], '?').rsplit('/', 1)[-1]}:{location[2]}"
            lines[number] = ""
        elif re.match(r"\s*\.(file|section)\b", line):
            lines[number] = ""
        source_at[number + 1] = current
    return "\n".join(lines), source_at


@dataclass
class _Body:
    """The statements between an entry's braces. Names declared in a nested scope are made unique."""

    text: str
    kernel: Kernel
    source_at: dict[int, str]
    scopes: Scopes = field(default_factory=lambda: [{}])
    made: int = 0
    jumps: list[tuple[Instruction, Scopes]] = field(default_factory=list)  # resolved when every label is known

    def read(self, position: int) -> None:
        """Walk from just after the opening brace until the matching closing one."""
        text = self.text
        line, seen = text.count("\n", 0, position) + 1, position
        while self.scopes:
            while text[position].isspace():
                position += 1
            line += text.count("\n", seen, position)
            seen = position
            label = _LABEL.match(text, position)
            if text[position] == "{":
                self.scopes.append({})
                position += 1
            elif text[position] == "}":
                self.scopes.pop()
                position += 1
            elif label:
                self._label(label[1])
                position = label.end()
            else:
                end = text.index(";", position)
                self._statement(" ".join(text[position:end].split()), line)
                position = end + 1
        for jump, known in self.jumps:
            if isinstance(jump.operands[0], Symbol):
                name = f"label {jump.operands[0].name}"
                found = next((scope[name] for scope in reversed(known) if name in scope), None)
                if found:
                    jump.operands[0] = Symbol(found)

    def _label(self, name: str) -> None:
        if len(self.scopes) > 1:
            self.made += 1
            self.scopes[-1][f"label {name}"] = name = f"{name}@{self.made}"
        self.kernel.labels[name] = len(self.kernel.code)

    def _statement(self, statement: str, line: int) -> None:
        if statement.startswith(".reg"):
            self._declare(statement)
        elif statement.startswith("."):
            if not re.match(r"\.(pragma|loc|shared|local)\b", statement):
                raise PTXSyntaxError(f"line {line}: unknown directive {statement!r}")
        elif statement:
            instruction = _instruction(statement, line, self.source_at.get(line, ""), self.scopes)
            self.kernel.code.append(instruction)
            if instruction.parts[0] == "bra":
                self.jumps.append((instruction, list(self.scopes)))

    def _declare(self, statement: str) -> None:
        _, kind, names = statement.split(None, 2)
        if kind.lstrip(".") not in _WIDTHS:
            raise PTXSyntaxError(f"register class {kind} is not supported: {statement}")
        for item in names.split(","):
            match = _DECLARED.match(item.strip())
            if match is None:
                raise PTXSyntaxError(f"cannot read {statement!r}")
            name, count = match[1], match[2]
            listed = [f"{name}{i}" for i in range(int(count))] if count else [name]
            if len(self.scopes) > 1:
                self.made += 1
                self.scopes[-1].update({one: f"{one}@{self.made}" for one in listed})
            for one in listed:
                self.kernel.registers[self.scopes[-1].get(one, one)] = _WIDTHS[kind.lstrip(".")]


def _instruction(statement: str, line: int, source: str, scopes: Scopes) -> Instruction:
    rest, guard = statement, None
    if rest.startswith("@"):
        name, rest = rest[1:].split(None, 1)
        operand = _operand(name, scopes)
        if not isinstance(operand, Register):
            raise PTXSyntaxError(f"line {line}: guard {name} is not a register")
        guard = operand
    match = _OPCODE.match(rest)
    if not match:
        raise PTXSyntaxError(f"line {line}: cannot read {statement!r}")
    operands = [_operand(item, scopes) for item in _split(rest[match.end() :])]
    return Instruction(match[0], operands, guard, line, statement, source)


def _split(text: str) -> list[str]:
    """Split at commas that are outside braces, brackets and parentheses."""
    items, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and not depth:
            items.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*items, last] if last else items


def integer(text: str) -> int:
    """The value of a PTX integer literal: decimal, 0x, 0b, or octal with a leading zero."""
    text = text.rstrip("U")
    sign = -1 if text.startswith("-") else 1
    digits = text.lstrip("+-").strip()
    if digits[:2].lower() in ("0x", "0b"):
        return sign * int(digits, 0)
    return sign * int(digits, 8 if digits.startswith("0") else 10)


def _items(text: str, scopes: Scopes) -> tuple[Operand, ...]:
    return tuple(_operand(item, scopes) for item in _split(text[1:-1]))


def _operand(text: str, scopes: Scopes) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return Vector(_items(text, scopes))
    if text.startswith("["):
        return _address(text[1:-1].strip(), scopes)
    if "|" in text:
        first, second = text.split("|")
        return Pair(_operand(first, scopes), _operand(second, scopes))
    if text.startswith("!"):
        inner = _operand(text[1:], scopes)
        if not isinstance(inner, Register):
            raise PTXSyntaxError(f"{text} negates what is not a register")
        return Register(inner.name, True)
    if text == SINK.name:
        return SINK
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        return Immediate(int(text[2:], 16), "f32")
    if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        return Immediate(int(text[2:], 16), "f64")
    if re.match(r"[+-]?\d", text):
        if "." in text:
            return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], "f64")
        return Immediate(integer(text))
    for scope in reversed(scopes):
        if text in scope:
            return Register(scope[text])
    if text.startswith("%") and not _SPECIAL.match(text):
        return Register(text)
    return Symbol(text)


def _address(text: str, scopes: Scopes) -> Operand:
    if "," in text:
        base, coordinates = _split(text)
        return TensorAddress(_operand(base, scopes), _items(coordinates, scopes))
    match = re.match(r"([%$A-Za-z_][\w$.]*)\s*(?:([+-])\s*(.+))?$", text)
    if not match:
        return Address(None, integer(text))
    offset = integer(match[3]) * (-1 if match[2] == "-" else 1) if match[3] else 0
    return Address(_operand(match[1], scopes), offset)
