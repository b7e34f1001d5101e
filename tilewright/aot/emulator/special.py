"""Special registers: who a thread is, and the shape of the launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tilewright.aot.emulator.errors import Unsupported
from tilewright.aot.emulator.numerics import Array

if TYPE_CHECKING:
    from tilewright.aot.emulator.machine import Machine


def special_register(machine: Machine, name: str) -> int | Array:
    """The value of ``%name`` for each thread. There is one multiprocessor, clusters have one CTA, clocks stand
    still.
    """
    base, _, axis_name = name.lstrip("%").partition(".")
    axis = {"": 0, "x": 0, "y": 1, "z": 2}.get(axis_name, 3)
    lane = machine.thread_of % 32
    if base in ("ctaid", "clusterid"):
        numbers: Array = np.array([(*cta, 0)[axis] for cta in machine.ctas], np.int64)[machine.cta_of]
        return numbers
    values: dict[str, int | Array] = {
        "tid": machine.thread_of if axis == 0 else 0,
        "ntid": machine.threads if axis == 0 else 1,
        "nctaid": (*machine.grid, 0)[axis],
        "nclusterid": (*machine.grid, 0)[axis],
        "laneid": lane,
        "warpid": machine.warp_of,
        "nwarpid": machine.threads // 32,
        **dict.fromkeys(("smid", "gridid", "clock", "clock64", "globaltimer", "cluster_ctaid", "cluster_ctarank"), 0),
        **dict.fromkeys(("nsmid", "cluster_nctaid", "cluster_nctarank"), 1),
        "lanemask_eq": 1 << lane,
        "lanemask_lt": (1 << lane) - 1,
        "lanemask_le": (2 << lane) - 1,
        "lanemask_gt": ~((2 << lane) - 1) & 0xFFFFFFFF,
        "lanemask_ge": ~((1 << lane) - 1) & 0xFFFFFFFF,
        "dynamic_smem_size": machine.shared_size,
        "total_smem_size": machine.shared_size,
    }
    if base not in values:
        raise Unsupported(f"symbol or special register {name}")
    return values[base]
