"""Reading compiled code: its matrix instructions, the width of its loads, the registers and private memory it takes.

Counts are of instructions as written, not as executed. PTX syntax: PTX ISA 9.0, sections "ld", "cp.async", "mma",
"wgmma.mma_async" and "tcgen05.mma"; AMD: LLVM's "User Guide for AMDGPU Backend", section "Code Object V5 Metadata",
and the CDNA3 ISA guide. SASS: CUDA Binary Utilities 12.9, section "Instruction Set Reference".
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

#: Kinds of matrix instructions, by the opcode at the start of a statement.
_PTX_MATRIX = (
    ("wgmma", re.compile(r"\bwgmma\.mma_async(?!\.sp)[.\w:]*")),
    ("wgmma.sp", re.compile(r"\bwgmma\.mma_async\.sp[.\w:]*")),
    ("tcgen05", re.compile(r"\btcgen05\.mma\b[.\w:]*")),
    ("mma.sync", re.compile(r"(?<![\w.])mma\.sync[.\w:]*")),
    ("mma.sp", re.compile(r"(?<![\w.])mma\.sp[.\w:]*")),
)
_PTX_LOAD = re.compile(r"(?<![\w.])ld\.(?:[\w:]+\.)*?global(?:\.[\w:]+)*")
_PTX_ASYNC = re.compile(
    r"(?<![\w.])cp\.async\.c[ag]\.shared(?:::\w+)?\.global[.\w:]*\s*\[[^\]]*\]\s*,\s*\[[^\]]*\]\s*,\s*(0x[0-9a-fA-F]+|\d+)"
)
_PTX_VECTOR = re.compile(r"\.v([248])(?=\.)")
_PTX_ELEMENT = re.compile(r"\.[busf]f?(\d+)\b")
_AMD_MATRIX = (("mfma", re.compile(r"\bv_mfma_\w+")), ("smfmac", re.compile(r"\bv_smfmac_\w+")))
_AMD_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(\w+)")
_AMD_BYTES = {
    **dict.fromkeys(("ubyte", "sbyte"), 1),
    **dict.fromkeys(("ushort", "sshort", "short"), 2),
    "dword": 4,
    "dwordx2": 8,
    "dwordx3": 12,
    "dwordx4": 16,
}
_USAGE = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")


@dataclass(frozen=True)
class Instructions:
    """Static counts. matrix: instructions by kind. loads: loads from global memory by bytes for each thread,
    asynchronous copies to shared memory included. async_copies: those copies alone.
    """

    matrix: dict[str, int]
    loads: dict[int, int]
    async_copies: int


def read_ptx(ptx: str) -> Instructions:
    """Counts of a PTX module."""
    code = "\n".join(line.split("//")[0] for line in ptx.splitlines())
    matrix = {kind: count for kind, pattern in _PTX_MATRIX if (count := len(pattern.findall(code)))}
    loads: Counter[int] = Counter()
    for match in _PTX_LOAD.finditer(code):
        vector, element = _PTX_VECTOR.search(match[0]), _PTX_ELEMENT.findall(match[0])
        loads[int(element[-1]) // 8 * (int(vector[1]) if vector else 1)] += 1
    copies = [int(size, 0) for size in _PTX_ASYNC.findall(code)]
    loads.update(copies)
    return Instructions(matrix, dict(loads), len(copies))


def read_amdgcn(assembly: str) -> Instructions:
    """Counts of AMD assembly."""
    code = "\n".join(line.split(";")[0] for line in assembly.splitlines())
    matrix = {kind: count for kind, pattern in _AMD_MATRIX if (count := len(pattern.findall(code)))}
    loads: Counter[int] = Counter()
    for kind in _AMD_LOAD.findall(code):
        # Suffixes such as ubyte_d16_hi say where in the register the loaded bytes go.
        loads[_AMD_BYTES[kind.split("_")[0]]] += 1
    return Instructions(matrix, dict(loads), 0)


@dataclass(frozen=True)
class Sass:
    """Static counts of NVIDIA machine code. instructions: of all kinds, padding left out. matrix: by opcode, such as
    ``HMMA.16816.F32`` or ``HGMMA.64x64x16.F32``. loads: from global memory by bytes for each thread, copies to shared
    memory included. local: accesses to memory private to a thread, which spills cause.
    """

    instructions: int
    matrix: dict[str, int]
    loads: dict[int, int]
    local: int


_SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
_SASS_MATRIX = re.compile(r"(?:[HIDQBO]G?|UTC[HIQO])MMA\b")
_SASS_LOAD = re.compile(r"LDG(?:STS)?\b")
_SASS_WIDTH = re.compile(r"\.(?:[US](8|16)|(64|128))\b")


def read_sass(text: str) -> Sass:
    """From what ``cuobjdump --dump-sass`` prints for a module with one kernel."""
    opcodes = [opcode for opcode in _SASS_LINE.findall(text) if opcode != "NOP"]
    if not opcodes:
        raise ValueError(f"no instructions in what cuobjdump printed: {text[-500:]!r}")
    loads: Counter[int] = Counter()
    for opcode in opcodes:
        if _SASS_LOAD.match(opcode):
            width = _SASS_WIDTH.search(opcode)
            loads[int(width[1] or width[2]) // 8 if width else 4] += 1
    return Sass(
        instructions=len(opcodes),
        matrix=dict(Counter(opcode for opcode in opcodes if _SASS_MATRIX.match(opcode))),
        loads=dict(loads),
        local=sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in opcodes),
    )


@dataclass(frozen=True)
class Resources:
    """Registers of one thread, bytes of memory private to one thread (what did not fit into registers), and bytes of
    shared memory of one block.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int = 0


def read_resource_usage(text: str) -> Resources:
    """From what ``cuobjdump --dump-resource-usage`` prints for a module with one kernel."""
    usage = {name: int(value) for name, value in _USAGE.findall(text)}
    if not {"REG", "STACK", "LOCAL"} <= usage.keys():
        raise ValueError(f"no resource usage in what cuobjdump printed: {text[-500:]!r}")
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"])


def read_amd_metadata(assembly: str) -> Resources:
    """From the metadata at the end of AMD assembly; registers are VGPRs, accumulation registers included."""
    values = dict(
        re.findall(r"^\s*-?\s*\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", assembly, re.M)
    )
    if len(values) != 3:
        raise ValueError(f"the assembly's metadata lacks register counts, only {sorted(values)} found")
    spilled = max(4 * int(values["vgpr_spill_count"]), int(values["private_segment_fixed_size"]))
    return Resources(int(values["vgpr_count"]), spilled)
