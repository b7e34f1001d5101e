"""Timing several pools of threads in one process: none is to run, or to stand in the way, while another is timed."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

#: Of one look, and what may be used meanwhile by threads that are at rest.
_LOOK, _USED = 0.005, 0.0005


def until_idle(patience: float = 1.0) -> None:
    """Sleep until the threads of this process are at rest, or for ``patience`` seconds.

    A pool of threads spins after a call in hope of another: OpenMP's for 10 to 15 ms here, ONNX Runtime's for 40 to 60.
    On a machine with as many cores as threads the next pool shares a core with it meanwhile, and its barriers wait for
    whole slices of the scheduler: 8, 16 or 24 ms where 0.8 was right.
    """
    for _ in range(round(patience / _LOOK)):
        used = time.process_time()
        time.sleep(_LOOK)
        if time.process_time() - used < _USED:
            return


@contextlib.contextmanager
def separate_cores() -> Iterator[Callable[[], None]]:
    """Inside, each call of what it gives keeps this thread on one core and all others of the process off it.

    A worker that rested while another pool ran may wake up on the core of the thread that waits for it, and stay there
    for a slice of the scheduler in every call: 4 ms where 0.8 was right. To be called when the pools exist, since a new
    thread is bound as the one that makes it. Does nothing on one core, and where the system binds no threads.
    """
    tasks = Path("/proc/self/task")
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") and tasks.is_dir() else set()

    def bind(own: set[int], others: set[int]) -> None:
        for task in tasks.iterdir():
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.sched_setaffinity(int(task.name), own if int(task.name) == threading.get_native_id() else others)

    if len(cores) < 2:
        yield lambda: None
        return
    first = min(cores)
    try:
        yield lambda: bind({first}, cores - {first})
    finally:
        bind(cores, cores)
