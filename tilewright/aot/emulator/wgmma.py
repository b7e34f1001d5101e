"""``wgmma``: asynchronous products by four warps, with operands in shared memory or registers.

A product executes when it is waited for. Until then its results may not be touched, nor its operands in registers
written; its operands in shared memory are checked at the issue, and must be unchanged when it executes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tilewright.aot.emulator.control import Queue, Step
from tilewright.aot.emulator.errors import AsyncHazard, PTXError, Unsupported
from tilewright.aot.emulator.fragments import (
    ELEMENTS,
    a_index,
    accumulate,
    arrange,
    c_index,
    form_of,
    numbers,
    order_of,
    read_accumulator,
    split,
    write_accumulator,
)
from tilewright.aot.emulator.numerics import U32, Array
from tilewright.aot.emulator.program import Instruction, Vector
from tilewright.aot.emulator.registry import Mask, Run, builds, elements, literal

if TYPE_CHECKING:
    from tilewright.aot.emulator.machine import Machine

_OTHER = {"mma_async", "sync", "aligned", "satfinite"}


def descriptor(word: int) -> tuple[int, int, int, int]:
    """(start, leading offset, stride offset, swizzle width, all in bytes) of a shared-memory matrix descriptor."""
    if word >> 49 & 7:
        raise Unsupported("wgmma descriptor with a base offset")
    width = {0: 0, 1: 128, 2: 64, 3: 32}[word >> 62]
    return (word & 0x3FFF) << 4, (word >> 16 & 0x3FFF) << 4, (word >> 32 & 0x3FFF) << 4, width


def swizzle(address: Array, width: int) -> Array:
    """XOR the 16-byte chunk number with the 128-byte line number, as far as ``width`` reaches."""
    return address ^ ((address >> 7) & (width // 16 - 1)) << 4 if width else address


def chunk_addresses(words: list[int], major: str, extent: int, element: int) -> Array:
    """Addresses [groups, lines, chunks] of the 16-byte chunks of one operand tile for each descriptor.

    K-major: a line is one of ``extent`` rows of 32 bytes in two chunks. MN-major, for elements of 16 bits: a line is
    one of 16 columns of K in extent / 8 chunks.
    """
    addresses: dict[int, Array] = {}
    for layout in {word & ~0x3FFF for word in words}:  # commonly one, with other starts
        _, leading, stride, width = descriptor(layout)
        if major == "k":
            row, chunk = np.arange(extent)[:, None], np.arange(2)[None, :]
            if width:
                offset = row // 8 * stride + row % 8 * width + chunk * 16
            else:
                offset = row // 8 * stride + row % 8 * 16 + chunk * leading
        else:
            column, chunk = np.arange(32 // element)[:, None], np.arange(extent * element // 16)[None, :]
            if width:
                per = width // 16
                offset = column // 8 * stride + column % 8 * width + chunk // per * leading + chunk % per * 16
            else:
                offset = column // 8 * leading + column % 8 * 16 + chunk * stride
        chosen = [at for at, word in enumerate(words) if word & ~0x3FFF == layout]
        start = np.array([descriptor(words[at])[0] for at in chosen])
        placed = swizzle(start[:, None, None] + offset, width)
        addresses.update(zip(chosen, placed, strict=True))
    return np.stack([addresses[at] for at in range(len(words))])


@dataclass(eq=False)
class _Product:
    """One instruction in flight: how to execute it for some warp groups, its register slots, and the groups that are
    still to execute it.
    """

    execute: Callable[[list[int]], None]
    results: frozenset[int]
    inputs: frozenset[int]
    groups: set[int]


class AsyncProducts:
    """``wgmma`` in flight in a batch of CTAs. ``results`` and ``inputs``: register slots that they write and read."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.queues: list[Queue[_Product]] = [Queue() for _ in range(machine.lanes // 128)]
        self.flying: list[_Product] = []
        self.results: set[int] = set()
        self.inputs: set[int] = set()

    def _groups(self, mask: Mask) -> list[int]:
        return [int(group) for group in self.machine.full_groups(mask, 128, "wgmma")]

    def issue(self, product: _Product) -> None:
        """Queue a product for each of its warp groups."""
        for group in product.groups:
            self.queues[group].open.append(product)
        self.flying.append(product)
        self.results |= product.results
        self.inputs |= product.inputs

    def commit(self, mask: Mask) -> None:
        """Close the current batch of the warp groups in ``mask``."""
        for group in self._groups(mask):
            self.queues[group].commit()

    def wait(self, keep: int, mask: Mask) -> None:
        """Execute, in order of issue, all but the ``keep`` latest committed batches of the groups in ``mask``."""
        due: dict[int, list[_Product]] = {}
        for group in self._groups(mask):
            closed = self.queues[group].closed
            while len(closed) > keep:
                due.setdefault(group, []).extend(closed.pop(0))
        due = {group: products for group, products in due.items() if products}
        if not due:
            return
        while due:
            first = next(iter(due.values()))[0]
            ready = [group for group, products in due.items() if products[0] is first]
            first.execute(ready)
            first.groups.difference_update(ready)
            for group in ready:
                due[group].pop(0)
                if not due[group]:
                    del due[group]
        self.flying = [product for product in self.flying if product.groups]
        self.results = set().union(*(product.results for product in self.flying))
        self.inputs = set().union(*(product.inputs for product in self.flying))

    def refuse(self, step: Step, mask: Mask) -> None:
        """Raise AsyncHazard if a step touches a result of a product in flight, or overwrites one of its inputs."""
        machine, guard = self.machine, step.instruction.guard
        on = np.ones(machine.lanes, bool) if mask is None else mask
        if guard is not None:
            on = on & machine.predicate(guard)()
        active = set(np.flatnonzero(on.reshape(-1, 128).any(axis=1)).tolist())
        for product in self.flying:
            if active.isdisjoint(product.groups):
                continue
            if not step.touched.isdisjoint(product.results):
                raise AsyncHazard("register of a wgmma result touched before its wgmma.wait_group")
            if not step.written.isdisjoint(product.inputs):
                raise AsyncHazard("register operand of a wgmma overwritten before its wgmma.wait_group")


@builds("wgmma")
def _wgmma(instruction: Instruction, machine: Machine) -> Run:
    what = instruction.parts[1]
    if what == "fence":
        return lambda mask: None
    if what == "commit_group":
        return lambda mask: machine.products.commit(mask)
    if what == "wait_group":
        keep = literal(instruction.operands[0])
        return lambda mask: machine.products.wait(keep, mask)
    if what != "mma_async":
        raise Unsupported(instruction.opcode)
    (n, k), kinds = form_of(instruction, r"m64n(\d+)k(\d+)", 3, _OTHER)
    return _WarpGroupProduct(instruction, machine, n, k, kinds).run


class _WarpGroupProduct:
    """``wgmma.mma_async``: D [64, n] = A [64, k] B [k, n], plus D where ``scale-d`` says so."""

    def __init__(self, instruction: Instruction, machine: Machine, n: int, k: int, kinds: list[str]) -> None:
        operands = instruction.operands
        self.machine, self.n, self.k = machine, n, k
        self.d_kind, self.a_kind, self.b_kind = kinds
        self.integer, self.saturate = self.d_kind == "s32", "satfinite" in instruction.parts
        self.d = [machine.target(item) for item in elements(operands[0])]
        self.from_registers = isinstance(operands[1], Vector)
        self.a = [machine.source(item, 32 if self.from_registers else 64) for item in elements(operands[1])]
        self.b = machine.source(operands[2], 64)
        self.scale = machine.source(operands[3], "pred")
        machine.not_touched(self.d)
        self.element = 4 // ELEMENTS[self.a_kind]
        if k * self.element != 32 or len(self.d) * 64 * (2 if self.d_kind == "f16" else 1) != 32 * n:
            raise Unsupported(instruction.opcode)
        literals = [literal(op) for op in operands[4:]]
        self.sign_a, self.sign_b = (literals[0], literals[1]) if len(literals) >= 2 else (1, 1)
        transposes = literals[2:]
        self.a_major = "mn" if not self.from_registers and len(transposes) == 2 and transposes[0] else "k"
        self.b_major = "mn" if transposes and transposes[-1] else "k"
        if "mn" in (self.a_major, self.b_major) and self.element != 2:
            raise Unsupported(instruction.opcode)
        self.order_a = order_of(a_index(4, ELEMENTS[self.a_kind]))
        self.flat_d = c_index(n // 8).reshape(-1)
        self.order_d = order_of(self.flat_d)

    def run(self, mask: Mask) -> None:
        """Check and capture the operands, and queue the product."""
        machine, values = self.machine, self.machine.values
        groups = machine.full_groups(mask, 128, "wgmma")
        right = self._fetch(self.b, self.b_major, self.n, groups)
        keep = values[self.scale].reshape(-1, 128)[groups, 0]
        left, fragments = None, np.empty(0)
        if self.from_registers:
            fragments = np.stack([values[slot] for slot in self.a], axis=1).reshape(-1, 4, 32, 4)[groups]
        else:
            left = self._fetch(self.a[0], self.a_major, 64, groups)

        def execute(ready: list[int]) -> None:
            at = np.searchsorted(groups, np.sort(ready))
            if left is None:
                elements = split(fragments[at].reshape(-1, 32, 4), self.a_kind)
                a = numbers(arrange(elements, self.order_a, (16, self.k)), self.a_kind).reshape(-1, 64, self.k)
            else:
                a = left.matrices(machine, at, self.a_kind)
            b = right.matrices(machine, at, self.b_kind).transpose(0, 2, 1)
            registers = np.stack([values[slot] for slot in self.d], axis=1).reshape(-1, 4, 32, len(self.d))
            held = np.where(keep[at][:, None, None, None], registers[groups[at]], U32(0))
            registers[groups[at]] = self._multiply(a, b, held)
            flat = registers.reshape(-1, len(self.d))
            for i, slot in enumerate(self.d):
                values[slot] = np.ascontiguousarray(flat[:, i])
            machine.stats.matrix["wgmma"] += len(ready)
            machine.stats.matrix_flops += 2 * 64 * self.n * self.k * len(ready)

        inputs = frozenset(self.a) if self.from_registers else frozenset()
        machine.products.issue(_Product(execute, frozenset(self.d), inputs, set(groups.tolist())))

    def _multiply(self, left: Array, right: Array, held: Array) -> Array:
        """The registers [groups, 4, 32, d] of A [groups, 64, k] B [groups, k, n] plus the accumulators ``held``."""
        stored = read_accumulator(np.ascontiguousarray(held), self.d_kind).reshape(len(left) * 4, 32, -1)
        initial = arrange(stored, self.order_d, (16, self.n)).reshape(-1, 64, self.n)
        result = accumulate(self.sign_a * left, self.sign_b * right, initial, self.integer, self.saturate)
        result = np.take(result.reshape(-1, 16 * self.n), self.flat_d, axis=1).reshape(len(left), 4, 32, -1)
        return write_accumulator(result, self.d_kind)

    def _fetch(self, slot: int, major: str, extent: int, groups: Array) -> _SharedOperand:
        """An operand of every warp group, checked as it is at the issue."""
        machine = self.machine
        words = machine.values[slot].reshape(-1, 128)[groups]
        if (words != words[:, :1]).any():
            raise PTXError("wgmma matrix descriptor differs between the threads of a warp group")
        addresses = chunk_addresses([int(word) for word in words[:, 0]], major, extent, self.element)
        lines, chunks = addresses.shape[1:]
        first = np.repeat(groups * 128, lines * chunks)
        machine.effective = first
        flat = machine.shared.flat(first // machine.threads, addresses.reshape(-1), 16, "wgmma read")
        data = machine.shared.load_async(flat, 16)
        shape = len(groups), lines, chunks
        return _SharedOperand(major, flat.reshape(shape), data.reshape(*shape, 16), first.reshape(shape))


@dataclass
class _SharedOperand:
    """A matrix operand in shared memory, for some warp groups: [groups, lines, chunks] of 16 bytes."""

    major: str
    flat: Array
    data: Array
    thread: Array

    def matrices(self, machine: Machine, at: Array, kind: str) -> Array:
        """[groups, extent, k] numbers of the groups ``at``, which must still be what they were at the issue."""
        flat, data = self.flat[at].reshape(-1), self.data[at]
        machine.effective = self.thread[at].reshape(-1)
        text = "shared operand of a wgmma was overwritten before its wgmma.wait_group"
        machine.shared.check_unchanged(flat, data.reshape(-1, 16), text)
        values = numbers(split(data.view(U32).reshape(len(at), data.shape[1], -1), kind), kind)
        return values if self.major == "k" else values.transpose(0, 2, 1)
