"""A PTX emulator on numpy: runs the PTX that Triton emits on a machine without a GPU and checks memory accesses and races.

    stats = emulate(kernel.asm["ptx"], grid=(4,), num_warps=4, args=[x, y, n], arch=80, shared=kernel.metadata.shared)

Tensors are CPU tensors, changed in place; see ``emulate`` for the options and the errors, ``Stats`` for what is counted.

parser     text to instructions           ops     arithmetic and data movement of single threads
machine    registers, control flow        access  loads, stores, atomics, cp.async, ldmatrix
memory     global and shared memory       warp    shuffles, votes, barriers
numerics   number formats                 mma     mma, mma.sp, wgmma
stats      counters                       tma     bulk tensor copies and mbarriers

What it cannot tell: time; the hardware's order of accumulation in tensor cores (sums are float64, rounded once); races inside a
warp; the last bits of approximate functions; anything undefined beyond what is checked. Not supported: device function calls
(printf, assert), clusters, warp specialisation (partial barriers), tcgen05, textures.
"""

# ruff: noqa: E501
from __future__ import annotations

from .machine import emulate
from .memory import AsyncHazard, Misaligned, OutOfBounds, PTXError, RaceError, UninitializedRead
from .ops import Unsupported
from .stats import Stats

__all__ = [
    "AsyncHazard",
    "Misaligned",
    "OutOfBounds",
    "PTXError",
    "RaceError",
    "Stats",
    "UninitializedRead",
    "Unsupported",
    "emulate",
]
