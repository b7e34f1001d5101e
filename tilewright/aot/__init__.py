"""Compiling kernels for a chip that is not here, reading what came out, and running it on an emulated one.

    from tilewright import aot

    compiled = aot.compile_launch(launch, "sm_90")        # or aot.compile(kernel, signature, constants, config, target)
    compiled.registers, compiled.spill_bytes, compiled.instructions.matrix
    stats = compiled.emulate(launch.grid, launch.args)    # fills the CPU tensors among the arguments
    aot.estimate(compiled, stats, "H200").seconds
    aot.rank({config: plan(config) for config in configs}, "H200")    # seconds, the fastest first

Knows no kernel by name. Triton is imported when one of these is first used, so that importing the package stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.aot.compiler import Compiled, Config, compile, compile_launch, emulate_launch
    from tilewright.aot.cost import CHIPS, Estimate, estimate, estimate_launch, rank
    from tilewright.aot.emulator import Stats
    from tilewright.aot.launch import Launch
    from tilewright.aot.targets import TARGETS, Target

__all__ = [
    "CHIPS",
    "TARGETS",
    "Compiled",
    "Config",
    "Estimate",
    "Launch",
    "Stats",
    "Target",
    "compile",
    "compile_launch",
    "emulate_launch",
    "estimate",
    "estimate_launch",
    "rank",
]
#: Where these are, in the order of what importing them costs.
_HOMES = ("targets", "launch", "emulator", "compiler", "cost")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = (importlib.import_module(f"{__name__}.{home}") for home in _HOMES)
    value = next(getattr(module, name) for module in modules if hasattr(module, name))
    globals()[name] = value
    return value
