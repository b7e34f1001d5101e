"""Pruning a space without the GPU it is for: compile each candidate ahead of time and drop what cannot be fast.

What spills registers, or takes more shared memory than the chip has, is dropped with the figures that say so. The rest
is a short list that a GPU only has to time, most promising first: ``tilewright tune --offline --target sm_90`` writes
it as JSON. The order is that of ``filling``, a model that no GPU has confirmed, so it drops nothing: a tuner whose time
is short times the first ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.autotune.device import triton_version
from tilewright.autotune.space import Tunable
from tilewright.autotune.store import MAX_BYTES, TableError

FORMAT = 1


@dataclass(frozen=True)
class Compiled:
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
class Pruned:
    """One problem's candidates: kept with their figures, dropped with the reason."""

    tunable: Tunable
    problem: Any
    kept: Mapping[Any, Compiled]
    dropped: Mapping[Any, str]


def prune(tunable: Tunable, problem: Any, target: str, progress: Callable[[int, int], None] | None = None) -> Pruned:
    """Compile every candidate for ``target``, of ``aot.TARGETS``. Raises ValueError for what is no Triton kernel.

    A candidate that does not compile is dropped with the compiler's words.
    """
    from tilewright.aot.compiler import compile_launch
    from tilewright.aot.targets import find_target

    chip = find_target(target)
    if tunable.hooks.launches is None:
        raise ValueError(f"{tunable.name} chooses between implementations: there is nothing to compile")
    sample = tunable.hooks.representative(problem)
    serving, refused = tunable.split_candidates(sample)
    kept: dict[Any, Compiled] = {}
    dropped = dict(refused)
    for place, config in enumerate(serving):
        try:
            launches = tunable.hooks.launches(tunable, sample, config, chip.backend)
            made = [compile_launch(launch, chip) for launch in launches]
        except Exception as error:  # a compiler may fail in any way
            dropped[config] = f"does not compile: {type(error).__name__}: {error}"[:500]
        else:
            limits = [words for compiled in made for words in compiled.over_limits]
            spilled = max((compiled.spill_bytes for compiled in made), default=0)
            if spilled:
                limits.append(f"{spilled} bytes of registers spill")
            if limits:
                dropped[config] = "; ".join(limits)
            else:
                units = tunable.hooks.device(sample).units
                full = [
                    filling(
                        math.prod(launch.grid),
                        compiled.num_warps,
                        compiled.registers,
                        compiled.shared_bytes,
                        units,
                        chip.shared_bytes + 1024,
                    )
                    for launch, compiled in zip(launches, made, strict=True)
                ]
                kept[config] = Compiled(
                    max((compiled.registers for compiled in made), default=0),
                    spilled,
                    max((compiled.shared_bytes for compiled in made), default=0),
                    " ".join(sorted({kind for compiled in made for kind in compiled.instructions.matrix})),
                    # The first launch is the product; what finishes it is short.
                    round(full[0], 3) if full and chip.backend == "cuda" else 0.0,
                )
        if progress is not None:
            progress(place + 1, len(serving))
    order = sorted(kept, key=lambda config: -kept[config].filling)
    return Pruned(tunable, sample, {config: kept[config] for config in order}, dropped)


def _key(tunable: Tunable, problem: Any) -> str:
    """Without driver and device: compiled code depends on the target, which the list names. Without Triton's version
    too: another makes code that differs little, and what is kept is timed anyway.
    """
    facts = [f"{what}={value}" for what, value in tunable.hooks.facts(problem).items()]
    return " | ".join([tunable.name, *facts, f"source={tunable.source()}"])


def write_short_list(path: Path, target: str, found: Sequence[Pruned]) -> None:
    """Write what ``prune`` found. Raises OSError."""
    lists = {
        _key(one.tunable, one.problem): {
            "kept": [
                {
                    "config": one.tunable.encode(config),
                    "registers": figures.registers,
                    "shared_bytes": figures.shared_bytes,
                    "matrix": figures.matrix,
                    "filling": figures.filling,
                }
                for config, figures in one.kept.items()
            ],
            "dropped": [
                {"config": one.tunable.encode(config), "reason": reason} for config, reason in one.dropped.items()
            ],
        }
        for one in found
    }
    text = json.dumps({"format": FORMAT, "target": target, "triton": triton_version(), "lists": lists}, indent=1)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


class ShortList:
    """A short list that was written by ``write_short_list``. Raises TableError for a file that is none."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise TableError(f"{path} is larger than {MAX_BYTES} bytes")
        try:
            data = json.loads(raw)
            if data["format"] != FORMAT:
                raise TableError(f"{path} has the format {data['format']!r}, not {FORMAT}")
            self.target = str(data["target"])
            self.lists = {
                str(key): [dict(one["config"]) for one in found["kept"]] for key, found in data["lists"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TableError(f"{path} is no short list of candidates: {error}") from error

    def candidates(self, tunable: Tunable, problem: Any) -> list[Any] | None:
        """Those kept for ``problem``, most promising first; None if the list does not speak of it, or of other code."""
        sample = tunable.hooks.representative(problem)
        kept = self.lists.get(_key(tunable, sample))
        if kept is None:
            return None
        known = {str(sorted(tunable.encode(config).items())): config for config in tunable.all_candidates(sample)}
        found = (known.get(str(sorted(fields.items()))) for fields in kept)
        return [config for config in found if config is not None]
