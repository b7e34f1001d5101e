"""Chips that kernels are compiled for when none of them is here, and what one program may use on each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A chip as Triton names it, with its limits.

    backend, arch, warp_size: as in Triton's ``GPUTarget``. shared_bytes: most shared memory (LDS) of one block.
    registers: most 32-bit registers of one thread. source: where the limits are written.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    registers: int
    source: str


_CUDA = "CUDA C++ Programming Guide 12.9, table 'Technical Specifications per Compute Capability'"
_CDNA3 = "AMD Instinct MI300 (CDNA3) ISA Reference Guide, sections 'VGPR Usage and Alignment' and 'LDS'"

TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, 255, _CUDA),
        Target("sm_89", "cuda", 89, 32, 99 * 1024, 255, _CUDA),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, 255, _CUDA),
        Target("sm_100", "cuda", 100, 32, 227 * 1024, 255, _CUDA),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, 512, _CDNA3),
    )
}


def find_target(name: Any) -> Target:
    """The target called ``name``, or the one that Triton's ``GPUTarget`` stands for.

    Raises ValueError that lists those known.
    """
    if isinstance(name, Target):
        return name
    if hasattr(name, "backend") and hasattr(name, "arch"):
        place = (name.backend, name.arch)
        name = next((target.name for target in TARGETS.values() if (target.backend, target.arch) == place), name)
    if name not in TARGETS:
        raise ValueError(f"no target is called {name!r}; known: {', '.join(TARGETS)}")
    return TARGETS[name]
