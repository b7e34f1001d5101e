"""A cost estimate from counts: how long a chip needs at least for what an emulated launch did.

    t = max(t_memory, t_matrix, t_issue, t_shared)

    t_memory = max(bytes from DRAM / DRAM bandwidth, 32 * sectors / L2 bandwidth)
    t_matrix = sum of 2 m n k over matrix instructions / rate of the matrix units
    t_issue  = warp instructions / 4 an SM and clock
    t_shared = wavefronts / 1 an SM and clock

The last three are taken on the SM with the most blocks: whole waves count. This is a roofline with two more roofs
(Williams et al., "Roofline", CACM 2009), not a simulation. How wrong it may be: it knows no latency, so a launch with
few warps or a short pipeline takes longer than it says, and no overlap but the perfect one. Instructions are those of
the PTX, of which ``ptxas`` makes fewer or more. What ``wgmma`` reads from shared memory is not among the wavefronts.
Expect a launch to take between 1 and 3 times the estimate on the same chip, and configurations that differ by less than
a third to be ranked wrongly at times. These bounds are a judgement: it has not been compared with a GPU yet.
``python -m bench.tables.estimates`` does so where there is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch

from tilewright.aot.compiler import Compiled, compile_launch
from tilewright.aot.emulator import Stats
from tilewright.aot.launch import Launch

_SHAPE = re.compile(r"\.m(\d+)n(\d+)k(\d+)\.")
_INT8 = re.compile(r"\.[su]8\b")


@dataclass(frozen=True)
class Chip:
    """Peak rates of one product. clock: Hz, under load. dram, l2: bytes a second. float16, tf32, int8: operations (a
    multiplication and an addition are two) that the matrix units of one SM do in a clock with ``matrix`` instructions.
    mma_share: the part of it that ``mma.sync`` reaches. source: where the figures are written.
    """

    name: str
    arch: int
    multiprocessors: int
    clock: float
    dram: float
    l2: float
    float16: int
    tf32: int
    int8: int
    mma_share: float
    source: str


_AMPERE = "NVIDIA A100 Tensor Core GPU Architecture (2020), tables 1 and 5"
_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture (2022), table 3; L2: Chips and Cheese, 'Nvidia's H100' (2023)"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", 80, 108, 1.41e9, 2.04e12, 5120 * 1.41e9, 2048, 1024, 4096, 1.0, _AMPERE),
        Chip("H100", 90, 132, 1.83e9, 3.35e12, 5.5e12, 4096, 2048, 8192, 0.65, _HOPPER),
        Chip("H200", 90, 132, 1.83e9, 4.8e12, 5.5e12, 4096, 2048, 8192, 0.65, _HOPPER),
    )
}


@dataclass(frozen=True)
class Estimate:
    """Seconds that each resource is busy at least; the launch takes at least the largest."""

    memory: float
    matrix: float
    issue: float
    shared: float

    @property
    def seconds(self) -> float:
        """The largest of them."""
        return max(getattr(self, field.name) for field in fields(self))

    @property
    def bound(self) -> str:
        """Which one that is."""
        return max((field.name for field in fields(self)), key=lambda name: getattr(self, name))


def find_chip(name: str | Chip) -> Chip:
    """The chip called ``name``. Raises ValueError that lists those known."""
    if isinstance(name, Chip):
        return name
    if name not in CHIPS:
        raise ValueError(f"no chip is called {name!r}; known: {', '.join(CHIPS)}")
    return CHIPS[name]


def matrix_clocks(stats: Stats, chip: Chip) -> float:
    """Clocks of one SM's matrix units that all the matrix instructions of ``stats`` take.

    Raises ValueError for an instruction whose shape cannot be read.
    """
    clocks = 0.0
    for opcode, count in stats.opcodes.items():
        is_group = opcode.startswith("wgmma.mma_async")
        if not (is_group or opcode.startswith("mma.")):
            continue
        shape = _SHAPE.search(f"{opcode}.")
        if shape is None:
            raise ValueError(f"the shape of {opcode} cannot be read")
        m, n, k = (int(size) for size in shape.groups())
        if _INT8.search(opcode):
            rate: float = chip.int8
        else:
            rate = chip.tf32 if ".tf32" in opcode else chip.float16
        if ".sp" in opcode:
            rate *= 2  # k counts the zeros that are skipped
        # A wgmma is executed by four warps together, each of which is counted.
        clocks += 2 * m * n * k * count / (4 if is_group else 1) / (rate * (1.0 if is_group else chip.mma_share))
    return clocks


def estimate(
    compiled: Compiled,
    stats: Stats,
    chip: str | Chip,
    *,
    blocks: int | None = None,
    dram_bytes: int | None = None,
) -> Estimate:
    """The least time of a launch on ``chip``, of ``CHIPS``.

    stats: of ``compiled.emulate``. blocks: of the launch to estimate, where fewer were emulated (default: as many).
    dram_bytes: what must come from or go to memory, usually the bytes of all tensors (default: every sector touched, as
    if there were no L2). Raises ValueError for an unknown chip, one of another architecture, or stats of no block.
    """
    chip = find_chip(chip)
    if compiled.target.arch != chip.arch:
        raise ValueError(f"{compiled.target.name} code does not run on {chip.name}, which is sm_{chip.arch}")
    if not stats.ctas:
        raise ValueError("nothing was emulated: there are no counts to estimate from")
    blocks = stats.ctas if blocks is None else blocks
    busiest = -(-blocks // chip.multiprocessors) / stats.ctas
    touched = 32 * sum(stats.sectors.values()) * blocks / stats.ctas
    return Estimate(
        memory=max((touched if dram_bytes is None else dram_bytes) / chip.dram, touched / chip.l2),
        matrix=busiest * matrix_clocks(stats, chip) / chip.clock,
        issue=busiest * stats.instructions / 4 / chip.clock,
        shared=busiest * sum(stats.wavefronts.values()) / chip.clock,
    )


Name = TypeVar("Name", bound=Hashable)


def estimate_launch(launch: Launch, chip: str | Chip, programs: int = 2) -> Estimate:
    """The least time of ``launch`` on ``chip``, from its first ``programs``, which stand for all of the grid.

    The arguments are CPU tensors of the real size, and outputs are written. Every tensor is taken to be moved between
    memory and the chip once. A launch that breaks a limit of the chip takes forever. Raises ValueError as ``estimate``
    does, and otherwise as ``Compiled.emulate``.
    """
    chip = find_chip(chip)
    compiled = compile_launch(launch, f"sm_{chip.arch}")
    blocks = math.prod(launch.grid)
    if compiled.over_limits:
        return Estimate(*[math.inf] * len(fields(Estimate)))
    if not blocks:
        return Estimate(*[0.0] * len(fields(Estimate)))
    few: list[int] = []
    for count in launch.grid:
        few.append(min(count, programs // math.prod(few) or 1))
    tensors = [value for value in launch.args.values() if isinstance(value, torch.Tensor)]
    moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return estimate(compiled, compiled.emulate(few, launch.args), chip, blocks=blocks, dram_bytes=moved)


def rank(candidates: Mapping[Name, Sequence[Launch]], chip: str | Chip, programs: int = 2) -> dict[Name, float]:
    """Seconds that each of ``candidates`` takes at least, the fastest first.

    candidates: by any name, the launches that do one task with one configuration, one after another. programs, errors:
    as in ``estimate_launch``. How far the order is to be trusted: see above.
    """
    seconds = {
        name: sum(estimate_launch(launch, chip, programs).seconds for launch in launches)
        for name, launches in candidates.items()
    }
    return dict(sorted(seconds.items(), key=lambda item: item[1]))
