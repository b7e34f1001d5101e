"""Scratch memory of the CPU implementations.

Memory that is allocated afresh in each call costs page faults worth a third of a small transformer's time, so
temporaries live in a scratch area for each thread.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from pathlib import Path

import torch

#: Elements of the float32 temporary that activations are quantised in. Blocks that fit a second-level cache would need
#: more parallel regions, whose barriers cost more than the cache saves.
BLOCK_ELEMENTS = 1 << 22
#: Elements of a block of dequantised weights.
WEIGHT_BLOCK_ELEMENTS = 1 << 20
_KEPT_BYTES = 64 << 20
_KEPT_VIEWS = 256
_local = threading.local()
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@functools.cache
def cache_bytes(level: int, folder: Path = _CACHES) -> int | None:
    """Bytes of the data cache of ``level`` that the first core has, alone or with others; None where the system does
    not say.
    """
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    try:
        for index in sorted(folder.glob("index*")):
            found = {name: (index / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size")}
            if found["level"] == str(level) and found["type"] in ("Data", "Unified"):
                return int(found["size"][:-1]) * units[found["size"][-1]]
    except (OSError, ValueError, KeyError, IndexError):
        pass  # a system that hides or spells it otherwise
    name = "SC_LEVEL1_DCACHE_SIZE" if level == 1 else f"SC_LEVEL{level}_CACHE_SIZE"
    size = os.sysconf(name) if name in getattr(os, "sysconf_names", {}) else 0
    return size if size > 0 else None


def scratch(shape: tuple[int, ...], dtype: torch.dtype, slot: str) -> torch.Tensor:
    """Uninitialised memory that this thread's next request for ``slot`` overwrites.

    Two dtypes of one slot are two views of the same memory.
    """
    views = _local.__dict__.setdefault("views", {})
    key = (slot, dtype, shape)
    view = views.get(key)
    if view is None:
        _keep_freed_memory()
        count = math.prod(shape) * dtype.itemsize
        areas = _local.__dict__.setdefault("areas", {})
        area = areas.get(slot)
        if area is None or area.numel() < count:
            with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
                area = torch.empty(count, dtype=torch.uint8)
            if count <= _KEPT_BYTES:
                areas[slot] = area
                views.clear()  # they may hold memory that is not used any more
        with torch.inference_mode(False):
            view = area[:count].view(dtype).view(shape)
        if areas.get(slot) is area:
            if len(views) >= _KEPT_VIEWS:
                views.clear()
            views[key] = view
    return view


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks of a few MiB, which layers of this size allocate and free at every call.

    It returns freed memory to the system beyond a threshold, and the next call pays a page fault for every 4 KiB of its
    output: as much time as the product of 800 x 384 x 1536 itself. The threshold follows the largest block that was
    freed (mallopt(3), M_MMAP_THRESHOLD), up to 32 MiB. Other allocators do not mind.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
