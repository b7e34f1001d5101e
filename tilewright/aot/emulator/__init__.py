"""A PTX emulator on numpy: runs compiled Triton kernels on a machine without a GPU, and checks what a GPU does not.

    stats = emulate(ptx, grid=(4,), num_warps=4, args=[x, y, n], arch=80, shared=shared_bytes)

Tensors are CPU tensors, changed in place. ``emulate`` documents the options and the errors, ``Stats`` what is counted,
and docs/emulator.md what is checked, what cannot be known this way and how the emulator itself was checked.

launch, machine, control          the run of a grid; registers; blocks
program, parser                   what the text says
registry                          how instructions are implemented
arithmetic, bits, comparison, conversion, movement, numerics      single threads
addresses, accesses, async_copies, bulk_copies      memory accesses
global_memory, shared_memory, views      the memories and their checks
threads                           shuffles, votes, barriers, fences
fragments, mma, wgmma             tensor cores
stats, errors                     what comes out
"""

from __future__ import annotations

from tilewright.aot.emulator.errors import (
    AsyncHazard,
    Misaligned,
    OutOfBounds,
    PTXError,
    PTXSyntaxError,
    RaceError,
    UninitializedRead,
    Unsupported,
)
from tilewright.aot.emulator.launch import Argument, emulate
from tilewright.aot.emulator.stats import Site, Stats

__all__ = [
    "Argument",
    "AsyncHazard",
    "Misaligned",
    "OutOfBounds",
    "PTXError",
    "PTXSyntaxError",
    "RaceError",
    "Site",
    "Stats",
    "UninitializedRead",
    "Unsupported",
    "emulate",
]
