"""The interpreter: registers, control flow, launches.

Every register is one numpy array over all threads of a batch of CTAs, so one numpy call executes an instruction for thousands
of threads. Branches that all threads take alike are jumps; otherwise the block with the lowest address among the threads'
next blocks runs first, under a mask, which reconverges structured code at its join.
"""

# mypy: ignore-errors
# ruff: noqa: D102, D103, E501, B007
from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from . import access, mma, ops, tma, warp  # noqa: F401  (they register the instructions they implement)
from .access import AsyncCopies
from .memory import GlobalMemory, LocalMemory, PTXError, SharedMemory
from .mma import AsyncMMA
from .numerics import U32, U64, WORD
from .ops import BUILDERS, Unsupported
from .parser import Imm, Instruction, Kernel, Reg, Sym, parse
from .stats import Stats
from .tma import BulkCopies

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# What a register holds before it is written: a NaN as any float, an address outside every tensor. Reading one is not an error:
# Triton pads inline assembly (``pack``) with undefined inputs.
UNDEFINED = {16: 0xFFFF, 32: 0xFFFFDEAD, 64: 0xFFFFDEADFFFFDEAD, "pred": False}
_BRANCHES = {"bra", "ret", "exit", "trap"}


@dataclass
class Block:
    """A straight run of instructions and the way out of it."""

    steps: list  # (run, instruction)
    leave: str  # "next", "jump", "branch", "return"
    guard: int | None = None  # register slot of the predicate
    negated: bool = False
    target: int = -1
    runs: int = 0  # warps that executed it
    opcodes: dict = field(default_factory=dict)


class Machine:
    """One kernel, decoded; ``launch`` runs it."""

    def __init__(
        self,
        kernel: Kernel,
        threads: int,
        arch: int,
        shared: int | None,
        races: str,
        profile: bool,
        cta_races: bool = False,
    ):
        self.kernel, self.threads, self.arch = kernel, threads, arch
        self.races, self.cta_races, self.first_cta = races, cta_races, 0
        self.registers, self._slots, self._constants = [], {}, {}
        self.memory = GlobalMemory()
        self.stats = Stats(profile)
        self.lanes = 0
        self.effective = None
        self.shared_size = self._layout_shared(shared)
        for name, data in kernel.constants.items():
            self.symbols[name] = self.memory.map(torch.frombuffer(bytearray(data), dtype=torch.uint8), name)
        self.wgmma = self.copies = self.bulk = None
        self.blocks = self._decode()

    # ------------------------------------------------------------------------------------------------ what builders use
    def _slot(self, key):
        if key not in self._slots:
            self._slots[key] = len(self.registers)
            self.registers.append(None)
        return self._slots[key]

    def width(self, operand):
        """Declared class of a register operand (16, 32, 64, "pred"), None for anything else."""
        return self._class(operand.name) if isinstance(operand, Reg) else None

    def _class(self, name):
        try:
            return self.kernel.registers[name]
        except KeyError:
            raise PTXError(f"register {name} is not declared") from None

    def target(self, operand):
        if not isinstance(operand, Reg):
            raise Unsupported(f"destination {operand}")
        self._class(operand.name)
        return self._slot(operand.name)

    def source(self, operand, bits):
        """The slot of a source operand; immediates and special registers become constants of ``bits`` bits."""
        if isinstance(operand, Reg):
            if operand.neg:
                raise Unsupported("negated predicate as an operand")
            width = self._class(operand.name)
            if width != bits:
                raise Unsupported(f"register {operand.name} of class {width} used as {bits}")
            return self._slot(operand.name)
        if isinstance(operand, Imm):
            if operand.kind == "f64" and bits == 32:
                raise Unsupported("double immediate in a 32-bit operand")
            key = ("imm", operand.value, bits)
        elif isinstance(operand, Sym):
            key = ("sym", operand.name, bits)
        else:
            raise Unsupported(f"source operand {operand}")
        slot = self._slot(key)
        self._constants[slot] = key
        return slot

    def condition_code(self):
        """The slot of the carry flag, clear at the start."""
        slot = self._slot(("condition code",))
        self._constants[slot] = ("imm", 0, "pred")
        return slot

    def parameter(self, name, bits):
        slot = self._slot(("param", name, bits))
        self._constants[slot] = ("param", name, bits)
        return slot

    def write(self, slot, value, mask):
        """Set a register from an array over all threads."""
        R = self.registers
        R[slot] = value if mask is None or R[slot] is None else np.where(mask, value, R[slot])

    def write_lanes(self, slot, value, mask):
        """Set a register from an array over the threads in ``mask`` only."""
        R = self.registers
        if mask is None:
            R[slot] = np.ascontiguousarray(value)
            return
        new = np.zeros(self.lanes, value.dtype) if R[slot] is None else R[slot].copy()
        new[mask] = value
        R[slot] = new

    def write_warps(self, slot, value, mask, warps):
        """Set a register from [warps, 32]."""
        R = self.registers
        if mask is None:
            R[slot] = np.ascontiguousarray(value).reshape(-1)
            return
        new = np.zeros(self.lanes, value.dtype) if R[slot] is None else R[slot].copy()
        new.reshape(-1, 32)[warps] = value
        R[slot] = new

    def full_groups(self, mask, size, name):
        """Indices of the groups of ``size`` threads that run; a partly active group is an error."""
        if mask is None:
            return np.arange(self.lanes // size)
        here = mask.reshape(-1, size)
        if (here.any(1) & ~here.all(1)).any():
            raise PTXError(f"{name} executed by some threads of a group of {size} only")
        return np.flatnonzero(here.any(1))

    def full_warps(self, mask, name):
        return slice(None) if mask is None else self.full_groups(mask, 32, name)

    def threads_of(self, mask):
        return self._all_threads if mask is None else np.flatnonzero(mask)

    def cta_numbers(self, mask):
        """The CTA of each active thread, counted over the grid, when races between CTAs are checked; else None."""
        return self.first_cta + self.cta_of[self.threads_of(mask)] if self.cta_races else None

    def scatter_mask(self, mask, some):
        out = mask.copy()
        out[mask] = some
        return out

    def shared_load(self, lanes, size, mask):
        threads = self.threads_of(mask)
        flat = self.shared.flat(self.cta_of[threads], lanes, size, "read")
        return self.shared.load(flat, size, self.warp_of[threads])

    def shared_store(self, lanes, data, mask):
        threads = self.threads_of(mask)
        flat = self.shared.flat(self.cta_of[threads], lanes, data.shape[1], "write")
        self.shared.store(flat, data, self.warp_of[threads])

    def atomic_access(self, space, mask):
        """(load, store) of one lane for a read-modify-write; shared atomics are exempt from the race check."""
        if space == "global":
            return (
                lambda lane, at, size: self.memory.load(np.array([at], U64), size),
                lambda lane, at, data: self.memory.store(np.array([at], U64), data),
            )
        threads = self.threads_of(mask)

        def flat(lane, at, size):
            return self.shared.flat(self.cta_of[threads[lane : lane + 1]], np.array([at]), size, "atomic")

        def load(lane, at, size):
            where, self.shared.races = flat(lane, at, size), "off"
            data = self.shared.load(where, size, np.zeros(1, np.int64))
            self.shared.races = self.races
            return data

        def store(lane, at, data):
            where, self.shared.races = flat(lane, at, data.shape[1]), "off"
            self.shared.store(where, data, np.zeros(1, np.int64))
            self.shared.races = self.races

        return load, store

    # --------------------------------------------------------------------------------------------------------- decoding
    def _layout_shared(self, given):
        """Place static arrays, then the dynamic one; returns the bytes a CTA has."""
        self.symbols, at = {}, 0
        for name, (align, size) in sorted(self.kernel.shared.items(), key=lambda item: item[1][1] is None):
            at = -(-at // align) * align
            self.symbols[name] = SharedMemory.BASE + at
            at += size or 0
        limit = SHARED_LIMIT.get(self.arch, 99 * 1024)
        return max(
            at
            if given is None and all(size is not None for _, size in self.kernel.shared.values())
            else (limit if given is None else given),
            at,
            16,
        )

    def _decode(self):
        code = self.kernel.code
        targets = {self._label(ins) for ins in code if ins.parts[0] == "bra"}
        leaders = sorted({0} | targets | {i + 1 for i, ins in enumerate(code) if ins.parts[0] in _BRANCHES})
        leaders = [i for i in leaders if i < len(code)]
        number = {start: i for i, start in enumerate(leaders)}
        blocks = []
        for start, end in itertools.pairwise([*leaders, len(code)]):
            last = code[end - 1]
            body = code[start:end]
            block = Block([], "next")
            if last.parts[0] in _BRANCHES:
                body = body[:-1]
                block.leave = {"bra": "jump"}.get(last.parts[0], "return")
                if last.parts[0] == "bra":
                    block.target = number.get(self._label(last), len(leaders))
                if last.pred is not None:
                    block.leave = "branch"
                    block.guard, block.negated = self._slot(last.pred.name), last.pred.neg
                    if last.parts[0] != "bra":
                        block.target = len(leaders)
                block.opcodes[last.opcode] = 1
            for ins in body:
                block.steps.append((self._build(ins), ins))
                block.opcodes[ins.opcode] = block.opcodes.get(ins.opcode, 0) + 1
            blocks.append(block)
        return blocks

    def _label(self, ins):
        name = ins.operands[0].name
        if name not in self.kernel.labels:
            raise PTXError(f"unknown label {name}")
        return self.kernel.labels[name]

    def _build(self, ins: Instruction):
        builder = BUILDERS.get(ins.parts[0])
        if builder is None:
            raise Unsupported(f"unknown opcode {ins.opcode} at {ins.where()}")
        try:
            run = builder(ins, self)
        except (Unsupported, PTXError, KeyError, IndexError, AttributeError) as error:
            raise Unsupported(
                f"cannot decode {ins.opcode} at {ins.where()}: {type(error).__name__}: {error}"
            ) from error
        if ins.pred is None:
            return run
        slot, negated, R = self._slot(ins.pred.name), ins.pred.neg, self.registers

        def guarded(mask):
            on = ~R[slot] if negated else R[slot]
            if mask is not None:
                on = on & mask
            if on.all():
                run(None)
            elif on.any():
                run(on)

        return guarded

    # -------------------------------------------------------------------------------------------------------- execution
    def launch(self, grid, arguments, batch, limit):
        grid = tuple(grid) + (1,) * (3 - len(grid))
        self.grid = grid
        self.arguments = self._bind(arguments)
        ctas = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        batch = batch or max(1, 2048 // self.threads)
        began = time.perf_counter()
        with np.errstate(all="ignore"):
            for start in range(0, len(ctas), batch):
                self.first_cta = start
                self._run_batch(ctas[start : start + batch], limit)
        self.stats.seconds = time.perf_counter() - began
        self.stats.finish(self.blocks, len(ctas))
        return self.stats

    def _bind(self, arguments):
        params = self.kernel.params
        if not len(params) - 2 <= len(arguments) <= len(params):
            raise ValueError(
                f"{self.kernel.name} takes {len(params)} parameters (two of them scratch), got {len(arguments)}"
            )
        bound = {}
        for (name, kind), value in itertools.zip_longest(params, arguments, fillvalue=None):
            if isinstance(value, torch.Tensor):
                if kind not in ("u64", "b64", "s64"):
                    raise TypeError(f"{name} is a {kind}, got a tensor")
                bound[name] = self.memory.map(value, name)
            elif kind == "f32":
                bound[name] = int(np.float32(value or 0).view(U32))
            elif kind == "f64":
                bound[name] = int(np.float64(value or 0).view(U64))
            elif isinstance(value, float):
                bound[name] = int(np.float32(value).view(U32))
            else:
                bound[name] = int(value or 0)
        return bound

    def _prepare(self, ctas):
        self.lanes = self.threads * len(ctas)
        self._all_threads = np.arange(self.lanes)
        self.cta_of = self._all_threads // self.threads
        self.thread_of = self._all_threads % self.threads
        self.warp_of = self.thread_of // 32
        self.ctas = ctas
        self.shared = SharedMemory(len(ctas), self.shared_size, self.races, proxies=self.arch >= 90)
        self.copies = AsyncCopies(self)
        self.wgmma = AsyncMMA(self)
        self.bulk = BulkCopies(self)
        self.local = LocalMemory(self.lanes, self.kernel.local)
        poison = {bits: np.full(self.lanes, value, WORD[bits]) for bits, value in UNDEFINED.items()}
        for key, slot in self._slots.items():
            self.registers[slot] = poison[self._class(key)] if isinstance(key, str) else None
        for slot, (kind, what, bits) in self._constants.items():
            if kind == "sym":
                value = self._special(what)
            else:
                value = self.arguments[what] if kind == "param" else what
            word = WORD[bits]
            if not isinstance(value, np.ndarray):
                value = np.full(self.lanes, bool(value) if bits == "pred" else int(value) & (1 << bits) - 1, word)
            self.registers[slot] = value.astype(word)

    def _special(self, name):
        if name in self.symbols:
            return self.symbols[name]
        if name in self.kernel.local:
            return self.local.symbols[name]
        if name in self.arguments:
            return self.arguments[name]
        base, _, axis = name.lstrip("%").partition(".")
        axis = {"": 0, "x": 0, "y": 1, "z": 2}.get(axis, 3)
        lane = self.thread_of % 32
        if base in ("ctaid", "clusterid"):
            return np.array([cta[axis] for cta in self.ctas], np.int64)[self.cta_of]
        values = {
            "tid": self.thread_of if axis == 0 else 0,
            "ntid": self.threads if axis == 0 else 1,
            "nctaid": self.grid[axis] if axis < 3 else 0,
            "nclusterid": self.grid[axis] if axis < 3 else 0,
            "laneid": lane,
            "warpid": self.warp_of,
            "nwarpid": self.threads // 32,
            "smid": 0,
            "nsmid": 1,
            "gridid": 0,
            "clock": 0,
            "clock64": 0,
            "globaltimer": 0,
            "cluster_ctaid": 0,
            "cluster_nctaid": 1,
            "cluster_ctarank": 0,
            "cluster_nctarank": 1,
            "lanemask_eq": 1 << lane,
            "lanemask_lt": (1 << lane) - 1,
            "lanemask_le": (2 << lane) - 1,
            "lanemask_gt": ~((2 << lane) - 1) & 0xFFFFFFFF,
            "lanemask_ge": ~((1 << lane) - 1) & 0xFFFFFFFF,
            "dynamic_smem_size": self.shared_size,
            "total_smem_size": self.shared_size,
        }
        if base not in values:
            raise Unsupported(f"symbol or special register {name}")
        return values[base]

    def _run_batch(self, ctas, limit):
        self._prepare(ctas)
        R, blocks, end = self.registers, self.blocks, len(self.blocks)
        at, waiting, executed = 0, None, 0  # ``waiting``: next block of each thread once they diverge
        warps = self.lanes // 32
        while True:
            if waiting is not None:
                at = int(waiting.min())
            if at >= end:
                break
            mask = None
            if waiting is not None:
                mask = waiting == at
                if mask.all():
                    mask = waiting = None
            block = blocks[at]
            block.runs += warps if mask is None else int(mask.reshape(-1, 32).any(1).sum())
            executed += 1
            if executed > limit:
                raise PTXError(f"{self.kernel.name}: more than {limit} basic blocks executed (endless loop?)")
            try:
                for run, ins in block.steps:
                    run(mask)
            except (PTXError, Unsupported, TypeError, ValueError, AttributeError, IndexError) as error:
                raise self._explain(error, ins, mask) from error
            following = at + 1
            if block.leave == "jump":
                following = block.target
            elif block.leave == "return":
                following = end
            elif block.leave == "branch":
                taken = ~R[block.guard] if block.negated else R[block.guard]
                among = taken if mask is None else taken[mask]
                if among.all():
                    following = block.target
                elif among.any():
                    if waiting is None:
                        waiting = np.full(self.lanes, at)
                        mask = waiting == at
                    waiting = np.where(mask, np.where(taken, block.target, at + 1), waiting)
                    continue
            if mask is None:
                at = following
            else:
                waiting = np.where(mask, following, waiting)
        if self.copies.flying:
            self.stats.warnings.add("cp.async still in flight when the kernel ended")
        if self.wgmma.pending:
            self.stats.warnings.add("wgmma never waited for")
        self.stats.races += self.shared.reports

    def _explain(self, error, ins, mask):
        """The same kind of error with the kernel, CTA, thread and instruction in its message."""
        lane = getattr(error, "lane", None)
        where = self.effective if self.effective is not None else mask
        text = f"{self.kernel.name}: {error}\n  at {ins.where()}"
        if lane is not None:
            if where is None:
                thread = lane
            elif where.dtype == bool:
                thread = int(np.flatnonzero(where)[lane])
            else:
                thread = int(where[lane])
            text += f"\n  CTA {self.ctas[self.cta_of[thread]]}, thread {int(self.thread_of[thread])}"
        elif not isinstance(error, (PTXError, Unsupported)):
            text += f"\n  (a defect of the emulator: {type(error).__name__})"
        kind = type(error) if isinstance(error, (PTXError, Unsupported)) else PTXError
        return kind(text)


def emulate(
    ptx: str,
    grid: tuple,
    num_warps: int,
    args: list,
    arch: int = 80,
    *,
    shared: int | None = None,
    races: str = "raise",
    cta_races: bool = False,
    profile: bool = True,
    batch: int | None = None,
    max_blocks: int = 10_000_000,
) -> Stats:
    """Run the kernel in ``ptx`` on CPU tensors, in place.

    grid: up to three CTA counts. args: in the order of the entry's parameters; tensors become pointers to their first element,
    ints and floats scalars; Triton's two trailing scratch pointers may be left out (null). Options:

    shared     bytes of dynamic shared memory (``kernel.metadata.shared``; default: the most the architecture allows)
    races      "raise", "report" (into ``Stats.races``) or "off": conflicting shared accesses of two warps between barriers
    cta_races  also raise when a CTA reads or writes global bytes that another one stored; not for kernels that order CTAs by
               flags in memory. Atomics are exempt
    profile    also count sectors and bank conflicts
    batch      CTAs run together (default: about 2048 threads)
    max_blocks limit on executed basic blocks, against endless loops

    Raises OutOfBounds, Misaligned, UninitializedRead, AsyncHazard, RaceError (all PTXError) for defects of the kernel, and
    Unsupported for instructions this emulator does not know.
    """
    kernel = parse(ptx)
    if kernel.reqntid not in (None, num_warps * 32):
        raise ValueError(
            f"the kernel wants {kernel.reqntid} threads a CTA, num_warps={num_warps} gives {num_warps * 32}"
        )
    if races not in ("raise", "report", "off"):
        raise ValueError(f"races: {races!r}")
    return Machine(kernel, num_warps * 32, arch, shared, races, profile, cta_races).launch(
        grid, args, batch, max_blocks
    )
