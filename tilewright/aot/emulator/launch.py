"""Running a kernel over a grid.

Branches that all threads take alike are jumps; otherwise the block with the lowest address among the threads' next
blocks runs first, under a mask, which reconverges structured code at its join.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

# The modules named first register the instructions that they implement.
from tilewright.aot.emulator import (  # noqa: F401
    accesses,
    arithmetic,
    bits,
    comparison,
    conversion,
    mma,
    movement,
    threads,
)
from tilewright.aot.emulator.errors import PTXError, Unsupported
from tilewright.aot.emulator.machine import Machine
from tilewright.aot.emulator.numerics import U32, U64, Array
from tilewright.aot.emulator.parser import parse
from tilewright.aot.emulator.registry import Mask
from tilewright.aot.emulator.stats import Stats

Argument = torch.Tensor | int | float | bool | None
_SCRATCH_POINTERS = 2  # that Triton adds after the kernel's own parameters


def emulate(
    ptx: str,
    grid: Sequence[int],
    num_warps: int,
    args: Sequence[Argument],
    arch: int = 80,
    *,
    shared: int | None = None,
    races: str = "raise",
    cta_races: bool = False,
    profile: bool = True,
    batch: int | None = None,
    max_blocks: int = 10_000_000,
    names: Sequence[str] = (),
) -> Stats:
    """Run the kernel in ``ptx`` on CPU tensors, in place, and return what was counted.

    ptx: a module with one entry, as ``triton.compile(...).asm["ptx"]``.
    grid: up to three CTA counts.
    num_warps: warps of a CTA.
    args: in the order of the entry's parameters; a tensor becomes the address of its first element, ints, floats and
        None (0) are scalars. Triton's two trailing scratch pointers may be left out (null).
    arch: compute capability times ten, 80 or 90; from 90 on, stores need a proxy fence before ``wgmma`` reads them.
    shared: bytes of dynamic shared memory (``kernel.metadata.shared``). Default: the most the architecture allows,
        which finds fewer accesses out of bounds.
    races: "raise", "report" (into ``Stats.races``) or "off": conflicting shared accesses of two warps between barriers.
    cta_races: also raise RaceError where a CTA stores global bytes that another one stores or reads. Not for kernels
        that order CTAs by flags in memory. Atomics are exempt.
    profile: count sectors and wavefronts too; costs up to a quarter of the time.
    batch: CTAs that run together (default: about 2048 threads).
    max_blocks: limit on the basic blocks executed by a batch, against endless loops.
    names: of the arguments, for messages; by default the entry's, which Triton numbers.

    Raises OutOfBounds, Misaligned, UninitializedRead, AsyncHazard, RaceError or plain PTXError for a defect of the
    kernel; Unsupported for instructions that the emulator does not know and PTXSyntaxError for text it cannot read;
    ValueError or TypeError for arguments that do not fit the kernel.
    """
    kernel = parse(ptx)
    if kernel.threads not in (None, num_warps * 32):
        raise ValueError(
            f"num_warps: the kernel wants {kernel.threads} threads in a CTA, {num_warps} warps have {num_warps * 32}"
        )
    if races not in ("raise", "report", "off"):
        raise ValueError(f"races: expected 'raise', 'report' or 'off', got {races!r}")
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"grid: expected one to three counts, got {tuple(grid)}")
    machine = Machine(kernel, num_warps * 32, arch, shared, races, profile, cta_races)
    x, y, z = (*(int(count) for count in grid), 1, 1)[:3]
    machine.grid = (x, y, z)
    machine.arguments = _bind(machine, args, names)
    ctas = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    size = batch or max(1, 2048 // machine.threads)
    began = time.perf_counter()
    with np.errstate(all="ignore"):
        for start in range(0, len(ctas), size):
            machine.first_cta = start
            machine.prepare(ctas[start : start + size])
            _run_batch(machine, max_blocks)
    machine.stats.seconds = time.perf_counter() - began
    machine.stats.finish(machine.blocks, len(ctas))
    return machine.stats


def _bind(machine: Machine, args: Sequence[Argument], names: Sequence[str]) -> dict[str, int]:
    """The bits of each parameter. ``names``: what messages call the first ones."""
    parameters = machine.kernel.parameters
    if not len(parameters) - _SCRATCH_POINTERS <= len(args) <= len(parameters):
        raise ValueError(
            f"args: {machine.kernel.name} takes {len(parameters)} parameters, of which Triton's {_SCRATCH_POINTERS} "
            f"scratch pointers may be left out, got {len(args)}"
        )
    bound = {}
    given = [*args, *[None] * (len(parameters) - len(args))]
    called = [*names, *(name for name, _ in parameters[len(names) :])]
    for (name, kind), label, value in zip(parameters, called, given, strict=True):
        if isinstance(value, torch.Tensor):
            if kind not in ("u64", "b64", "s64"):
                raise TypeError(f"args: {label} is a {kind}, got a tensor")
            bound[name] = machine.memory.map(value, label)
        elif kind == "f64":
            bound[name] = int(np.float64(value or 0).view(U64))
        elif kind == "f32" or isinstance(value, float):
            bound[name] = int(np.float32(value or 0).view(U32))
        elif value is None or isinstance(value, int):
            bound[name] = int(value or 0)
        else:
            raise TypeError(f"args: {label} is a {kind}, got {type(value).__name__}")
    return bound


def _run_batch(machine: Machine, limit: int) -> None:
    values, blocks, end = machine.values, machine.blocks, len(machine.blocks)
    products = machine.products
    at, executed = 0, 0
    waiting: Mask = None  # the next block of each thread, once they diverge
    warps = machine.lanes // 32
    while True:
        if waiting is not None:
            at = int(waiting.min())
        if at >= end:
            break
        mask: Mask = None
        if waiting is not None:
            mask = waiting == at
            if mask.all():
                mask = waiting = None
        block = blocks[at]
        block.runs += warps if mask is None else int(mask.reshape(-1, 32).any(axis=1).sum())
        executed += 1
        if executed > limit:
            raise PTXError(f"{machine.kernel.name}: more than {limit} basic blocks executed (endless loop?)")
        instruction = block.leaving
        try:
            for step in block.steps:
                instruction = step.instruction
                if products.results and not (
                    step.touched.isdisjoint(products.results) and step.written.isdisjoint(products.inputs)
                ):
                    products.refuse(step, mask)
                step.run(mask)
        except (PTXError, Unsupported, TypeError, ValueError, AttributeError, IndexError) as error:
            if instruction is None:
                raise
            raise machine.explain(error, instruction, mask) from error
        following = at + 1
        leaves: Array | None = None  # which threads leave, where some do
        if block.leaving is not None:
            everyone = True
            if block.guard is not None:
                leaves = ~values[block.guard] if block.negated else values[block.guard]
                among = leaves if mask is None else leaves[mask]
                everyone = bool(among.all())
                if everyone or not among.any():
                    leaves = None
            if block.leaving.parts[0] == "trap" and (everyone or leaves is not None):
                raise machine.explain(PTXError("trap executed"), block.leaving, mask)
            if everyone:
                following = block.target
        if leaves is not None:
            next_blocks: Array = np.where(leaves, block.target, following)
            waiting = next_blocks if waiting is None or mask is None else np.where(mask, next_blocks, waiting)
        elif mask is None or waiting is None:
            at = following
        else:
            waiting = np.where(mask, following, waiting)
    last = next((block.leaving for block in reversed(blocks) if block.leaving is not None), None)
    try:
        machine.bulk.finish()
    except PTXError as error:
        if last is None:
            raise
        raise machine.explain(error, last, None) from error
    if machine.copies.flying:
        machine.stats.warnings.add("cp.async still in flight when the kernel ended")
    if products.flying:
        machine.stats.warnings.add("wgmma never waited for")
    machine.stats.races += machine.shared.reports
