"""Weights in the order a kernel likes, made from the canonical weight once and kept as long as it lives.

The cache is keyed on the canonical tensor's memory, so it follows the module without being part of it: never saved,
never copied by ``deepcopy``, never moved by ``.to``. Writing into the weight in place (``load_state_dict``) makes the
next call repack.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from tilewright.kernels.dispatch.same import TensorCache, storage_of

T = TypeVar("T")
_entries: TensorCache[Any] = TensorCache(objects=False)
_lock = threading.Lock()


def packed(weight: torch.Tensor, layout: str, make: Callable[[], T], *others: torch.Tensor | None) -> T:
    """What ``make()`` returned for this ``weight`` and ``layout``, calling it only if that is not known yet.

    others: further tensors that ``make`` reads, such as scales; replacing or writing into one also makes it run again.
    ``make`` must not keep a reference to memory of any of them, which would then never be freed.
    """
    tensors = (weight, *others)
    # A square matrix and its transpose differ in nothing but strides.
    key = (
        tuple(None if t is None else storage_of(t) for t in tensors),
        layout,
        weight.storage_offset(),
        weight.shape,
        weight.stride(),
        weight.dtype,
    )
    found: T | None = _entries.get(key, tensors)
    if found is None:
        with _lock:
            found = _entries.get(key, tensors)
            if found is None:
                found = _entries.make(key, tensors, make)
    return found


def invalidate(weight: torch.Tensor) -> None:
    """Drop what was made from ``weight``, after a write that no version counter saw (inference tensors have none)."""
    memory = storage_of(weight)
    with _lock:  # what is being made may have read the weight before
        for key, _ in _entries.items():
            if memory in key[0]:
                _entries.drop(key)


def packed_bytes() -> int:
    """Bytes held by repacked weights at this moment."""
    return sum(_nbytes(value) for _, value in _entries.items())


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(_nbytes(item) for item in value)
    return 0
