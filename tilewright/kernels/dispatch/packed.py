"""Weights in the order a kernel likes, made from the canonical weight once and kept as long as it lives.

The cache is keyed on the canonical tensor's memory, so it follows the module without being part of it: never saved,
never copied by ``deepcopy``, never moved by ``.to``. Writing into the weight in place (``load_state_dict``) makes the
next call repack.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_entries: dict[tuple[Any, ...], tuple[tuple[Any, ...], Any]] = {}
_lock = threading.Lock()


def version_of(weight: torch.Tensor) -> int:
    """How often ``weight`` was written to in place."""
    # Tensors created in inference mode have no version counter.
    return -1 if weight.is_inference() else weight._version


def packed(weight: torch.Tensor, layout: str, make: Callable[[], T], *others: torch.Tensor | None) -> T:
    """What ``make()`` returned for this ``weight`` and ``layout``, calling it only if that is not known yet.

    others: further tensors that ``make`` reads, such as scales; replacing or writing into one also makes it run again.
    ``make`` must not keep a reference to memory of any of them, which would then never be freed.
    """
    # A square matrix and its transpose differ in nothing but strides.
    key = (weight.data_ptr(), layout, weight.device, weight.shape, weight.stride())
    state = (version_of(weight), *(None if t is None else (t.data_ptr(), version_of(t)) for t in others))
    entry = _entries.get(key)
    if entry is not None and entry[0] == state:
        return entry[1]
    with _lock:
        entry = _entries.get(key)
        if entry is not None and entry[0] == state:
            return entry[1]
        value = make()
        _entries[key] = (state, value)
        for tensor in (weight, *others):
            if tensor is not None and tensor.numel():
                # Memory that is freed may be handed out again: the entry must be gone before it is.
                weakref.finalize(tensor.untyped_storage(), _entries.pop, key, None).atexit = False
    return value


def invalidate(weight: torch.Tensor) -> None:
    """Drop what was made from ``weight``, after a write that no version counter saw (inference tensors have none)."""
    for key in [key for key in list(_entries) if key[0] == weight.data_ptr()]:
        _entries.pop(key, None)


def packed_bytes() -> int:
    """Bytes held by repacked weights at this moment."""
    return sum(_nbytes(value) for _, value in list(_entries.values()))


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(_nbytes(item) for item in value)
    return 0
