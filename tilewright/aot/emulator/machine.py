"""The machine's registers and memories, and the services that instructions are built from.

Every register is one numpy array over all threads of a batch of CTAs, so one numpy call executes an instruction for
thousands of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tilewright.aot.emulator.async_copies import AsyncCopies
from tilewright.aot.emulator.bulk_copies import BulkCopies
from tilewright.aot.emulator.control import Step, cut
from tilewright.aot.emulator.errors import PTXError, Unsupported
from tilewright.aot.emulator.global_memory import GlobalMemory, LocalMemory
from tilewright.aot.emulator.numerics import U32, U64, WORD, Array
from tilewright.aot.emulator.program import Immediate, Instruction, Kernel, Operand, Register, Symbol, Width
from tilewright.aot.emulator.registry import BUILDERS, Mask
from tilewright.aot.emulator.shared_memory import SharedMemory
from tilewright.aot.emulator.stats import Stats
from tilewright.aot.emulator.wgmma import AsyncProducts

#: Most bytes of shared memory of a CTA, by architecture.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# What a register holds before it is written: a NaN as any float, an address outside every tensor. To read one is not an
# error: Triton pads inline assembly (``pack``) with undefined inputs.
_UNDEFINED: dict[Width, int] = {16: 0xFFFF, 32: 0xFFFFDEAD, 64: 0xFFFFDEADFFFFDEAD, "pred": 0}
SlotKey = str | tuple[str, Any, Width]


class Machine:
    """One kernel, decoded for CTAs of ``threads`` threads. The options are those of ``emulate``."""

    def __init__(
        self, kernel: Kernel, threads: int, arch: int, shared: int | None, races: str, profile: bool, cta_races: bool
    ) -> None:
        self.kernel, self.threads, self.arch = kernel, threads, arch
        self.races, self.cta_races, self.first_cta = races, cta_races, 0
        self.values: list[Array] = []  # of each register slot
        self._slots: dict[SlotKey, int] = {}
        self._constants: dict[int, tuple[str, Any, Width]] = {}
        self._touched: set[int] = set()
        self._written: set[int] = set()
        self.memory = GlobalMemory()
        self.stats = Stats(profile)
        self.symbols: dict[str, int] = {}
        self.arguments: dict[str, int] = {}
        self.grid = (1, 1, 1)
        self.effective: Array | None = None  # the threads of the access under way, for messages
        self.shared_size = self._place_shared(shared)
        for name, data in kernel.constants.items():
            self.symbols[name] = self.memory.map(torch.frombuffer(bytearray(data), dtype=torch.uint8), name)
        self.prepare([])
        self.blocks = cut(kernel, self._build, self._slot)

    # ---------------------------------------------------------------------------------------------------- decoding
    def _place_shared(self, given: int | None) -> int:
        """Place static arrays, then the one sized at launch; returns the bytes of a CTA."""
        end, dynamic = 0, False
        for name, (alignment, size) in sorted(self.kernel.shared.items(), key=lambda item: item[1][1] is None):
            start = -(-end // alignment) * alignment
            self.symbols[name] = SharedMemory.BASE + start
            end = start + (size or 0)
            dynamic |= size is None
        if given is None:
            given = SHARED_LIMIT.get(self.arch, 99 * 1024) if dynamic else 0
        return max(given, end, 16)

    def _build(self, instruction: Instruction) -> Step:
        builder = BUILDERS.get(instruction.parts[0])
        if builder is None:
            raise Unsupported(f"unknown opcode {instruction.opcode} at {instruction.where()}")
        self._touched, self._written = set(), set()
        try:
            run = builder(instruction, self)
        except (Unsupported, PTXError, KeyError, IndexError, AttributeError, ValueError) as error:
            text = f"cannot decode {instruction.opcode} at {instruction.where()}: {type(error).__name__}: {error}"
            raise Unsupported(text) from error
        if instruction.guard is not None:
            guard, plain = self.predicate(instruction.guard), run

            def run(mask: Mask) -> None:
                on = guard() if mask is None else guard() & mask
                if on.all():
                    plain(None)
                elif on.any():
                    plain(on)

        return Step(run, instruction, frozenset(self._touched), frozenset(self._written))

    def _slot(self, key: SlotKey) -> int:
        if key not in self._slots:
            self._slots[key] = len(self.values)
            self.values.append(np.empty(0))
        self._touched.add(self._slots[key])
        return self._slots[key]

    def _class(self, name: str) -> Width:
        if name not in self.kernel.registers:
            raise PTXError(f"register {name} is not declared")
        return self.kernel.registers[name]

    def width(self, operand: Operand | None) -> Width | None:
        """Declared class of a register operand (16, 32, 64, "pred"), None for anything else."""
        return self._class(operand.name) if isinstance(operand, Register) else None

    def target(self, operand: Operand) -> int:
        """The slot of a destination register."""
        if not isinstance(operand, Register):
            raise Unsupported(f"destination {operand}")
        self._class(operand.name)
        slot = self._slot(operand.name)
        self._written.add(slot)
        return slot

    def source(self, operand: Operand | None, width: Width) -> int:
        """The slot of a source operand; literals and special registers become constants of ``width`` bits."""
        key: tuple[str, Any, Width]
        if isinstance(operand, Register):
            if operand.negated:
                raise Unsupported("negated predicate as an operand")
            if self._class(operand.name) != width:
                raise Unsupported(f"register {operand.name} of class {self._class(operand.name)} used as {width}")
            return self._slot(operand.name)
        if isinstance(operand, Immediate):
            key = ("literal", _literal_bits(operand, width), width)
        elif isinstance(operand, Symbol):
            key = ("symbol", operand.name, width)
        else:
            raise Unsupported(f"source operand {operand}")
        return self._constant(key)

    def parameter(self, name: str, width: Width) -> int:
        """The slot that holds an argument of the kernel."""
        return self._constant(("parameter", name, width))

    def condition_code(self) -> int:
        """The slot of the carry flag, clear at the start."""
        slot = self._slot("condition code")
        self._constants[slot] = ("literal", 0, "pred")
        return slot

    def _constant(self, key: tuple[str, Any, Width]) -> int:
        slot = self._slot(key)
        self._constants[slot] = key
        return slot

    def predicate(self, operand: Operand) -> Callable[[], Array]:
        """A function that gives the values of a predicate operand, which may be negated."""
        values = self.values
        if isinstance(operand, Register) and operand.negated:
            slot = self.source(Register(operand.name), "pred")
            return lambda: ~values[slot]
        slot = self.source(operand, "pred")
        return lambda: values[slot]

    def not_touched(self, slots: list[int]) -> None:
        """Called by a builder: these slots are not read or written when the instruction runs, but later."""
        self._touched.difference_update(slots)
        self._written.difference_update(slots)

    # --------------------------------------------------------------------------------------------------- execution
    def prepare(self, ctas: list[tuple[int, int, int]]) -> None:
        """Fresh registers and shared memory for a batch of CTAs."""
        self.ctas = ctas
        self.lanes = self.threads * len(ctas)
        self._all_threads = np.arange(self.lanes)
        self.cta_of = self._all_threads // self.threads
        self.thread_of = self._all_threads % self.threads
        self.warp_of = self.thread_of // 32
        self.shared = SharedMemory(len(ctas), self.shared_size, self.races, proxies=self.arch >= 90)
        self.copies = AsyncCopies(self)
        self.products = AsyncProducts(self)
        self.bulk = BulkCopies(self)
        self.local = LocalMemory(self.lanes, self.kernel.local)
        undefined = {width: np.full(self.lanes, value, WORD[width]) for width, value in _UNDEFINED.items()}
        for key, slot in self._slots.items():
            if slot in self._constants:
                self.values[slot] = self._constant_value(*self._constants[slot])
            elif isinstance(key, str):
                self.values[slot] = undefined[self._class(key)]

    def _constant_value(self, origin: str, what: Any, width: Width) -> Array:
        value = self._symbol(what) if origin == "symbol" else self.arguments[what] if origin == "parameter" else what
        if isinstance(value, np.ndarray):
            return value.astype(WORD[width])
        if width == "pred":
            return np.full(self.lanes, bool(value))
        return np.full(self.lanes, int(value) & (1 << width) - 1, WORD[width])

    def _symbol(self, name: str) -> int | Array:
        for known in (self.symbols, self.local.symbols, self.arguments):
            if name in known:
                return known[name]
        return self._special_register(name)

    def _special_register(self, name: str) -> int | Array:
        """The value of ``%name`` for each thread. There is one multiprocessor, clusters have one CTA, clocks stand
        still.
        """
        base, _, axis_name = name.lstrip("%").partition(".")
        axis = {"": 0, "x": 0, "y": 1, "z": 2}.get(axis_name, 3)
        lane = self.thread_of % 32
        if base in ("ctaid", "clusterid"):
            numbers: Array = np.array([(*cta, 0)[axis] for cta in self.ctas], np.int64)[self.cta_of]
            return numbers
        values: dict[str, int | Array] = {
            "tid": self.thread_of if axis == 0 else 0,
            "ntid": self.threads if axis == 0 else 1,
            "nctaid": (*self.grid, 0)[axis],
            "nclusterid": (*self.grid, 0)[axis],
            "laneid": lane,
            "warpid": self.warp_of,
            "nwarpid": self.threads // 32,
            **dict.fromkeys(
                ("smid", "gridid", "clock", "clock64", "globaltimer", "cluster_ctaid", "cluster_ctarank"), 0
            ),
            **dict.fromkeys(("nsmid", "cluster_nctaid", "cluster_nctarank"), 1),
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

    def write(self, slot: int | None, value: Array, mask: Mask) -> None:
        """Set a register, if there is one, from an array over all threads."""
        if slot is not None:
            self.values[slot] = value if mask is None else np.where(mask, value, self.values[slot])

    def write_lanes(self, slot: int | None, value: Array, mask: Mask) -> None:
        """Set a register, if there is one, from an array over the threads in ``mask`` only."""
        if slot is None:
            return
        if mask is None:
            self.values[slot] = np.ascontiguousarray(value)
            return
        new = self.values[slot].copy()
        new[mask] = value
        self.values[slot] = new

    def full_groups(self, mask: Mask, size: int, name: str) -> Array:
        """Indices of the groups of ``size`` threads that run; a partly active group is an error."""
        if mask is None:
            return np.arange(self.lanes // size)
        here = mask.reshape(-1, size)
        if (here.any(axis=1) & ~here.all(axis=1)).any():
            raise PTXError(f"{name} executed by some threads of a group of {size} only")
        return np.flatnonzero(here.any(axis=1))

    def full_warps(self, mask: Mask, name: str) -> slice | Array:
        """An index of the warps that run; a partly active one is an error."""
        return slice(None) if mask is None else self.full_groups(mask, 32, name)

    def threads_of(self, mask: Mask) -> Array:
        """Numbers of the active threads."""
        return self._all_threads if mask is None else np.flatnonzero(mask)

    def cta_numbers(self, mask: Mask) -> Array | None:
        """The CTA of each active thread, counted over the grid, where races between CTAs are looked for."""
        if not self.cta_races:
            return None
        numbers: Array = self.first_cta + self.cta_of[self.threads_of(mask)]
        return numbers

    def shared_offsets(self, address: Array, size: int, mask: Mask, verb: str) -> tuple[Array, Array]:
        """(flat offsets, warps) of the active threads' shared addresses."""
        threads = self.threads_of(mask)
        return self.shared.flat(self.cta_of[threads], address, size, verb), self.warp_of[threads]

    def explain(self, error: Exception, instruction: Instruction, mask: Mask) -> Exception:
        """The same kind of error with the kernel, instruction, CTA and thread in its message."""
        lane = getattr(error, "lane", None)
        where = self.effective if self.effective is not None else mask
        text = f"{self.kernel.name}: {error}\n  at {instruction.where()}"
        if lane is not None:
            if where is None:
                thread = int(lane)
            else:
                thread = int((np.flatnonzero(where) if where.dtype == np.bool_ else where)[lane])
            text += f"\n  CTA {self.ctas[self.cta_of[thread]]}, thread {int(self.thread_of[thread])}"
        elif not isinstance(error, PTXError | Unsupported):
            text += f"\n  (a defect of the emulator: {type(error).__name__})"
        return type(error)(text) if isinstance(error, PTXError | Unsupported) else PTXError(text)


def _literal_bits(operand: Immediate, width: Width) -> int:
    """A literal's bits in a register of ``width`` bits: floats take the width of the operand."""
    if operand.kind == "f64" and width == 32:
        return int(U64(operand.value).view(np.float64).astype(np.float32).view(U32))
    if operand.kind == "f32" and width == 64:
        return int(U32(operand.value).view(np.float32).astype(np.float64).view(U64))
    if width == "pred":
        return int(operand.value != 0)
    return operand.value
