"""PTX text -> a flat list of decoded statements of one kernel.

Only the subset of the grammar that a compiler emits is understood: one ``.entry`` function, register declarations
(also inside nested ``{ }`` scopes of inline assembly), labels, and predicated instructions. Debug sections, ``.loc`` and
``.file`` lines are dropped, but the source line of each instruction is kept for error messages.
"""

# mypy: ignore-errors
# ruff: noqa: D102, D103, E501, B007
from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field


class PTXSyntaxError(ValueError):
    """The text is outside the grammar this parser knows."""


# ----------------------------------------------------------------------------------------------------------- operands
@dataclass(frozen=True)
class Reg:
    """A virtual register; ``neg`` marks a negated predicate source (``!%p1``)."""

    name: str
    neg: bool = False


@dataclass(frozen=True)
class Imm:
    """An immediate. ``kind`` is "int", "f32" or "f64"; ``value`` holds the integer value or the raw bits."""

    value: int
    kind: str = "int"


@dataclass(frozen=True)
class Vec:
    """A braced operand list ``{a, b, ...}``."""

    items: tuple


@dataclass(frozen=True)
class Addr:
    """A memory operand ``[base + offset]``; ``base`` is a Reg, a Sym, or None for an absolute address."""

    base: object
    offset: int = 0


@dataclass(frozen=True)
class TensorAddr:
    """A tensor operand ``[base, {coordinates}]``."""

    base: object
    coordinates: tuple


@dataclass(frozen=True)
class Sym:
    """A symbol (shared array, parameter, label) or a special register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Pair:
    """Two destinations written ``a|b``."""

    first: object
    second: object


SINK = Sym("_")


@dataclass
class Instruction:
    """One PTX instruction: ``opcode`` is the dotted name, ``parts`` its components, ``pred`` the guard or None."""

    opcode: str
    operands: list
    pred: Reg | None
    line: int
    text: str
    source: str = ""

    def __post_init__(self):
        self.parts = self.opcode.split(".")

    def where(self) -> str:
        at = f" ({self.source})" if self.source else ""
        return f"line {self.line}{at}: {self.text}"


@dataclass
class Kernel:
    """A parsed entry function."""

    name: str
    target: str
    params: list  # [(name, type)]
    registers: dict  # register name (or numbered prefix) -> bit class "pred" | 16 | 32 | 64
    code: list  # Instruction
    labels: dict  # label -> index into code
    shared: dict = field(default_factory=dict)  # symbol -> (alignment, bytes or None when sized at launch)
    constants: dict = field(default_factory=dict)  # symbol -> bytes of an initialised .global or .const array
    local: dict = field(default_factory=dict)  # symbol -> (alignment, bytes) for each thread
    reqntid: int | None = None


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_LABEL = re.compile(r"([$A-Za-z_][\w$.]*)\s*:(?!:)")
_ARRAY = re.compile(r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.b8\s+([\w$]+)\s*\[\s*(\d*)\s*\]\s*;")
_CONSTANT = re.compile(
    r"\.(?:global|const)\s+(?:\.align\s+\d+\s+)?\.[bu](8|16|32|64)\s+([\w$]+)\s*\[\s*(\d+)\s*\]\s*=\s*"
    r"\{([^}]*)\}"
)
_REGDECL = re.compile(r"([%\w$]+)(?:<(\d+)>)?$")
_OPCODE = re.compile(r"[a-z][\w.:]*")
_SPECIAL = re.compile(
    r"%(?:tid|ntid|ctaid|nctaid|laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock64|globaltimer|"
    r"cluster_ctaid|cluster_nctaid|clusterid|nclusterid|cluster_ctarank|cluster_nctarank|lanemask_\w+|"
    r"dynamic_smem_size|total_smem_size)\b(?:\.[xyzw])?$"
)
_CLASS = {
    "pred": "pred",
    "b8": 16,
    "u8": 16,
    "s8": 16,
    "b16": 16,
    "u16": 16,
    "s16": 16,
    "f16": 16,
    "b32": 32,
    "u32": 32,
    "s32": 32,
    "f32": 32,
    "b64": 64,
    "u64": 64,
    "s64": 64,
    "f64": 64,
}


def parse(ptx: str) -> Kernel:
    """Parse the only ``.entry`` in ``ptx``. Raises PTXSyntaxError when there is none or more than one."""
    text = _COMMENT.sub(lambda m: "\n" * m.group().count("\n"), ptx)
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M))
    source_at, current = {}, ""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        loc = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line)
        if loc:
            current = f"{files.get(loc.group(1), '?').rsplit('/', 1)[-1]}:{loc.group(2)}"
            lines[number] = ""
        elif re.match(r"\s*\.(file|section)\b", line):
            lines[number] = ""
        source_at[number + 1] = current
    text = "\n".join(lines)

    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(", text))
    if len(entries) != 1:
        raise PTXSyntaxError(f"expected exactly one .entry, found {len(entries)}")
    if re.search(r"^\s*(?:\.visible\s+|\.weak\s+)?\.func\b", text, re.M):
        raise PTXSyntaxError("device functions (.func with call) are not supported")
    entry = entries[0]
    close = text.index(")", entry.end())
    declared = [item.split() for item in text[entry.end() : close].split(",") if item.strip()]
    params = [(words[-1], words[1].lstrip(".")) for words in declared]
    start = text.index("{", close)
    header = text[close:start]
    ntid = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", header)
    target = re.search(r"\.target\s+(\w+)", text)
    kernel = Kernel(
        entry.group(1),
        target.group(1) if target else "",
        params,
        {},
        [],
        {},
        reqntid=int(ntid.group(1)) if ntid else None,
    )
    for space, align, name, size in _ARRAY.findall(text):
        getattr(kernel, space)[name] = (int(align or 1), int(size) if size else None)
    for width, name, count, values in _CONSTANT.findall(text):
        size = int(width) // 8
        data = b"".join((integer(v.strip()) % (1 << int(width))).to_bytes(size, "little") for v in values.split(","))
        kernel.constants[name] = data.ljust(int(count) * size, b"\0")
    _parse_body(text, start + 1, kernel, source_at)
    return kernel


def _parse_body(text, position, kernel, source_at):
    """Walk statements from just after the opening brace until the matching closing one.

    Names declared in a nested scope (registers and labels of inline assembly) are made unique.
    """
    scopes, made = [{}], 0
    jumps = []  # (instruction, labels in scope), resolved when every label is known
    line, seen = text.count("\n", 0, position) + 1, position
    while True:
        while text[position].isspace():
            position += 1
        line += text.count("\n", seen, position)
        seen = position
        char = text[position]
        if char == "{":
            scopes.append({})
            position += 1
            continue
        if char == "}":
            scopes.pop()
            position += 1
            if not scopes:
                break
            continue
        label = _LABEL.match(text, position)
        if label:
            name = label.group(1)
            if len(scopes) > 1:
                made += 1
                scopes[-1][f"label {name}"] = name = f"{name}@{made}"
            kernel.labels[name] = len(kernel.code)
            position = label.end()
            continue
        end = text.index(";", position)
        statement = " ".join(text[position:end].split())
        position = end + 1
        if not statement:
            continue
        if statement.startswith(".reg"):
            made = _declare(statement, kernel, scopes, made)
        elif statement.startswith("."):
            if not re.match(r"\.(pragma|loc|shared|local)\b", statement):
                raise PTXSyntaxError(f"line {line}: unknown directive {statement!r}")
        else:
            kernel.code.append(_instruction(statement, line, source_at.get(line, ""), scopes))
            if kernel.code[-1].parts[0] == "bra":
                jumps.append((kernel.code[-1], list(scopes)))
    for jump, known in jumps:
        name = f"label {jump.operands[0].name}"
        found = next((scope[name] for scope in reversed(known) if name in scope), None)
        if found:
            jump.operands[0] = Sym(found)


def _declare(statement, kernel, scopes, made):
    _, kind, names = statement.split(None, 2)
    kind = kind.lstrip(".")
    if kind not in _CLASS:
        raise PTXSyntaxError(f"register class {kind} is not supported: {statement}")
    for item in names.split(","):
        match = _REGDECL.match(item.strip())
        name, count = match.group(1), match.group(2)
        listed = [f"{name}{i}" for i in range(int(count))] if count else [name]
        if len(scopes) > 1:  # a name local to an inline-assembly block: make it unique
            made += 1
            for one in listed:
                scopes[-1][one] = f"{one}@{made}"
        for one in listed:
            kernel.registers[scopes[-1].get(one, one)] = _CLASS[kind]
    return made


def _instruction(statement, line, source, scopes):
    rest, pred = statement, None
    if rest.startswith("@"):
        guard, rest = rest[1:].split(None, 1)
        pred = _operand(guard, scopes)
    match = _OPCODE.match(rest)
    if not match:
        raise PTXSyntaxError(f"line {line}: cannot read {statement!r}")
    operands = [_operand(item, scopes) for item in _split(rest[match.end() :])]
    return Instruction(match.group(), operands, pred, line, statement, source)


def _split(text):
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
    """The value of a PTX integer literal."""
    text = text.rstrip("U")
    sign = -1 if text.startswith("-") else 1
    digits = text.lstrip("+-").strip()
    return sign * (int(digits, 0) if digits[:2].lower() in ("0x", "0b") else int(digits, 10))


def _operand(text, scopes):
    text = text.strip()
    if text.startswith("{"):
        return Vec(tuple(_operand(item, scopes) for item in _split(text[1:-1])))
    if text.startswith("["):
        inner = text[1:-1].strip()
        if "," in inner:
            base, coordinates = _split(inner)
            return TensorAddr(_operand(base, scopes), _operand(coordinates, scopes).items)
        match = re.match(r"([%$A-Za-z_][\w$.]*)\s*(?:([+-])\s*(.+))?$", inner)
        if not match:
            return Addr(None, integer(inner))
        offset = 0
        if match.group(3):
            offset = integer(match.group(3)) * (-1 if match.group(2) == "-" else 1)
        return Addr(_operand(match.group(1), scopes), offset)
    if "|" in text:
        return Pair(*(_operand(item, scopes) for item in text.split("|")))
    if text.startswith("!"):
        return Reg(_operand(text[1:], scopes).name, True)
    if text == "_":
        return SINK
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        return Imm(int(text[2:], 16), "f32")
    if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        return Imm(int(text[2:], 16), "f64")
    if re.match(r"[+-]?\d", text):
        if "." in text:
            return Imm(struct.unpack("<Q", struct.pack("<d", float(text)))[0], "f64")
        return Imm(integer(text))
    for scope in reversed(scopes):
        if text in scope:
            return Reg(scope[text])
    if text.startswith("%") and not _SPECIAL.match(text):
        return Reg(text)
    return Sym(text)
