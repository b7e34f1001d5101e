"""When tuning happens: in no call of a model, unless the user says so.

By default a kernel takes its tuned configuration from a table, or else the one its heuristic picks, and no call waits.
``convert_model`` may time for two seconds who serves linear layers on a CPU (``convert.tuned``); not with
``TILEWRIGHT_AUTOTUNE=0`` in the environment. ``TILEWRIGHT_AUTOTUNE=1``, or

    with tilewright.autotune.on_first_use():
        model(x)

times what is not in a table the first time it is used. Not while a CUDA graph is captured, whatever the mode. Caches of
what was chosen ask to be told when the mode, or a table, changes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

import torch

VARIABLE = "TILEWRIGHT_AUTOTUNE"
_lock = threading.Lock()
_depth = 0
_listeners: list[Callable[[], None]] = []


def when_changed(clear: Callable[[], None]) -> None:
    """Have ``clear`` called whenever a table or the mode changes."""
    _listeners.append(clear)


def changed() -> None:
    """Tell all who asked."""
    for clear in _listeners:
        clear()


@contextlib.contextmanager
def on_first_use() -> Iterator[None]:
    """Inside, whatever is used and not in a table yet is tuned, in every thread of the process.

    The first call for a problem then takes seconds. What is found goes to the user's table (``tilewright cache show``).
    """
    global _depth
    with _lock:
        _depth += 1
    changed()  # choices made without tuning would hide that there is something to tune
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
        changed()


def tuning_wanted() -> bool:
    """Whether the user asked for tuning on first use. Raises ValueError for a bad TILEWRIGHT_AUTOTUNE."""
    if _depth:
        return True
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}={value} is neither 0 nor 1")
    return value == "1"


def why_not_now() -> str | None:
    """Why nothing can be timed at this moment, or None: a capture would record, or be broken by, what is timed."""
    if torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if torch.compiler.is_compiling():
        return "a graph is being traced"
    return None
