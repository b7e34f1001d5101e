"""Pruning a space without the GPU it is for: compile each candidate ahead of time and drop what cannot be fast.

What spills registers, or takes more shared memory than the chip has, is dropped with the figures that say so. The rest
is a short list (``shortlist.py``) that a GPU only has to time, most promising first. The order is that of ``filling``,
a model that no GPU has confirmed, so it drops nothing: a tuner whose time is short times the first ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from tilewright.aot.launch import Launch
from tilewright.autotune.space import Tunable

if TYPE_CHECKING:
    from tilewright.aot.assembly import Resources
    from tilewright.aot.targets import Target


@dataclass(frozen=True)
class CompiledCandidate:
    """The worst of a candidate's kernels: registers of a thread, bytes that spilled, bytes of shared memory of a block.
    matrix: kinds of matrix instruction. filling: of the chip, see ``filling``.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix: str
    filling: float = 0.0


#: Bytes that a multiprocessor of an H200 must have on the way to read at full rate: 4.8 TB/s x 0.7 us / 132.
IN_FLIGHT = 26_000
_REGISTERS, _WARPS, _BLOCKS = 65_536, 64, 32


def filling(blocks: int, warps: int, registers: int, shared_bytes: int, units: int, shared_of_unit: int) -> float:
    """How full a launch keeps an NVIDIA chip, 0 to 1: the share of block slots that work, over whole waves, times the
    share of the bytes on the way that hide the memory's latency, as far as its buffers in shared memory hold them.

    Limits of a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
    """
    by_registers = _REGISTERS // max(registers * 32 * warps, 1)
    by_shared = shared_of_unit // (shared_bytes + 1024)
    resident = max(min(by_registers, by_shared, _WARPS // warps, _BLOCKS), 1)
    units, blocks = max(units, 1), max(blocks, 1)
    # Blocks on the fullest multiprocessor at a time: fewer than can be resident, if there are few.
    working = min(resident, -(-blocks // units))
    waves = -(-blocks // (working * units))
    return blocks / (waves * working * units) * min(working * shared_bytes / IN_FLIGHT, 1.0)


@dataclass(frozen=True)
class ShortListed:
    """One problem's candidates: kept with their figures, dropped with the reason."""

    tunable: Tunable
    problem: Any
    kept: Mapping[Any, CompiledCandidate]
    dropped: Mapping[Any, str]


@dataclass(frozen=True)
class _Figures:
    """What is kept of one compiled kernel. limits: in words, those that it breaks."""

    resources: Resources
    num_warps: int
    matrix: frozenset[str]
    limits: tuple[str, ...]


class Compiler:
    """Compiles launches for one target, each specialisation once: most problems share them."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._known: dict[tuple[Any, ...], _Figures] = {}

    def figures(self, launch: Launch) -> _Figures:
        """Of the code that ``launch`` would run. Raises what the compiler raises."""
        from tilewright.aot.compiler import compile_launch
        from tilewright.aot.specialize import specialize

        key = (launch.kernel, str(specialize(launch, self.target)), launch.num_warps, launch.num_stages)
        if key not in self._known:
            made = compile_launch(launch, self.target)
            matrix = frozenset(made.instructions.matrix)
            self._known[key] = _Figures(made.resources, made.num_warps, matrix, tuple(made.over_limits))
        return self._known[key]


def prune(
    tunable: Tunable,
    problem: Any,
    target: str,
    progress: Callable[[int, int], None] | None = None,
    compiler: Compiler | None = None,
) -> ShortListed:
    """Compile every candidate for ``target``, of ``aot.TARGETS``. Raises ValueError for what is no Triton kernel.

    A candidate that does not compile is dropped with the compiler's words. compiler: one for several problems, which
    then share what it compiled.
    """
    from tilewright.aot.targets import find_target

    compiler = compiler or Compiler(find_target(target))
    chip = compiler.target
    if tunable.hooks.launches is None:
        raise ValueError(f"{tunable.name} chooses between implementations: there is nothing to compile")
    sample = tunable.hooks.representative(problem)
    serving, refused = tunable.split_candidates(sample)
    kept: dict[Any, CompiledCandidate] = {}
    dropped = dict(refused)
    for place, config in enumerate(serving):
        try:
            launches = tunable.hooks.launches(tunable, sample, config, chip.backend)
            made = [compiler.figures(launch) for launch in launches]
        except Exception as error:  # a compiler may fail in any way
            dropped[config] = f"does not compile: {type(error).__name__}: {error}"[:500]
        else:
            limits = [words for one in made for words in one.limits]
            used = [(0, 0, 0), *(astuple(one.resources) for one in made)]
            registers, spilled, shared = map(max, zip(*used, strict=True))
            if spilled:
                limits.append(f"{spilled} bytes of registers spill")
            if limits:
                dropped[config] = "; ".join(limits)
            else:
                kept[config] = CompiledCandidate(
                    registers,
                    spilled,
                    shared,
                    " ".join(sorted({kind for one in made for kind in one.matrix})),
                    _filling_of(launches, made, tunable.hooks.device(sample).units, chip),
                )
        if progress is not None:
            progress(place + 1, len(serving))
    order = sorted(kept, key=lambda config: -kept[config].filling)
    return ShortListed(tunable, sample, {config: kept[config] for config in order}, dropped)


def _filling_of(launches: Sequence[Launch], made: Sequence[_Figures], units: int, chip: Target) -> float:
    """Of the product, which takes the time, or of the first launch where nothing multiplies matrices."""
    if chip.backend != "cuda" or not made:
        return 0.0
    launch, figures = next(
        (pair for pair in zip(launches, made, strict=True) if pair[1].matrix), (launches[0], made[0])
    )
    sizes = (figures.num_warps, figures.resources.registers, figures.resources.shared_bytes)
    return round(filling(math.prod(launch.grid), *sizes, units, chip.shared_bytes + 1024), 3)
