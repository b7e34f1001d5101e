"""Whether tensors are what they were when something was made of them: a repacked weight, a prepared call, a recording.

PyTorch counts writes in ``_version``. It does not count ``p.data = other``, ``p.data.resize_``, ``share_memory_`` and
``swap_tensors``, which are seen in the address or the layout; and memory that was freed is handed out again under its
old address, so storages are watched with weak references. (Tensors are not: ``swap_tensors`` refuses those that are.)
What leaves no trace is a write into memory that stays, through ``p.data`` or NumPy, or by an optimizer with
``fused=True`` (torch 2.13.0, ``findings/torch_fused_optimizer_version.sh``), unless it is followed by
``torch.autograd.graph.increment_version``.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


def version_of(tensor: torch.Tensor) -> int:
    """How often ``tensor`` was written to in place; -1 for those that do not count it: tensors made in inference mode,
    whatever their ``.data`` is now.
    """
    if tensor.is_inference():
        return -1
    try:
        return tensor._version
    except RuntimeError:
        return -1


def holds_values(tensor: torch.Tensor) -> bool:
    """Whether the memory of ``tensor``, which is not complex, holds its values. PyTorch leaves some to the next
    operator: a sign to change (of ``z.conj().imag``), zeros that were never written (of some derivatives).
    """
    return not (tensor.is_neg() or tensor._is_zerotensor())


def storage_of(tensor: torch.Tensor) -> int:
    """A number for the memory of ``tensor`` and its views that no other memory has as long as this one lives."""
    return int(tensor.untyped_storage()._cdata)


def _state(tensor: torch.Tensor | None) -> Any:
    """All that a change of ``tensor`` may change; the device is in the address."""
    if tensor is None:
        return None
    return tensor.data_ptr(), version_of(tensor), tensor.dtype, tensor.shape, tensor.stride()


class SameTensors:
    """Remembers tensors (or None) as they are now, and keeps none of them alive.

    expired: called when the first of their storages is freed. objects: False where another tensor in the same memory,
    such as ``detach`` returns, is as good.
    """

    __slots__ = ("_expired", "_seen", "_states", "_watched")

    def __init__(
        self,
        tensors: Sequence[torch.Tensor | None],
        expired: Callable[[], object] | None = None,
        *,
        objects: bool = True,
    ):
        self._states = [_state(t) for t in tensors]
        #: The same for ``match``, which layers call each time. Asking for strides takes longer than whether there are
        #: any but the usual ones.
        self._seen: list[Any] | None = None
        if objects and all(state is None or state[1] >= 0 for state in self._states):
            self._seen = [
                None if t is None else (id(t), *state[:4], None if t.is_contiguous() else state[4])
                for t, state in zip(tensors, self._states, strict=True)
            ]
        gone: list[Any] = []
        self._expired = gone

        def expire(storage: Any) -> None:
            gone.append(storage)
            if expired is not None:
                expired()

        self._watched = [weakref.ref(t.untyped_storage(), expire) for t in tensors if t is not None]

    @property
    def expired(self) -> bool:
        """Whether one of their storages was freed."""
        return bool(self._expired)

    @property
    def freed(self) -> list[Any]:
        """Empty until one of their storages is freed."""
        return self._expired

    def match(self, tensors: Sequence[torch.Tensor | None]) -> bool:
        """Whether these are the tensors remembered, unwritten, in the same memory and of the same layout."""
        if self._expired or len(tensors) != len(self._states):
            return False
        if self._seen is None:
            return [_state(t) for t in tensors] == self._states
        for tensor, seen in zip(tensors, self._seen):  # noqa: B905  (counted above: strict takes longer)
            if tensor is None or seen is None:
                if tensor is not None or seen is not None:
                    return False
                continue
            number, address, version, dtype, shape, stride = seen
            if (
                id(tensor) != number
                or tensor.data_ptr() != address
                or tensor._version != version
                or tensor.dtype is not dtype
                or tensor.shape != shape
                or (not tensor.is_contiguous() if stride is None else tensor.stride() != stride)
            ):
                return False
        return True


class TensorCache(Generic[T]):
    """Values made from tensors, by key, each for as long as its tensors are the same.

    most: entries kept. objects: as of ``SameTensors``. A value must not keep memory of its tensors alive.
    """

    def __init__(self, most: int | None = None, *, objects: bool = True):
        self._most, self._objects = most, objects
        self._entries: dict[Any, tuple[SameTensors, T]] = {}

    def get(self, key: Any, tensors: Sequence[torch.Tensor | None]) -> T | None:
        """What was put there for ``tensors``; None if they have changed since, or nothing was."""
        entry = self._entries.get(key)
        return entry[1] if entry is not None and entry[0].match(tensors) else None

    def make(self, key: Any, tensors: Sequence[torch.Tensor | None], make: Callable[[], T]) -> T:
        """What ``make()`` returns, kept until one of ``tensors`` is freed.

        How these are is noted before: a write from another thread while ``make`` reads them is a change.
        """
        same = SameTensors(tensors, functools.partial(self._entries.pop, key, None), objects=self._objects)
        value = make()
        if self._most is not None and len(self._entries) >= self._most:
            self._entries.clear()
        self._entries[key] = same, value
        if same.expired:  # meanwhile, so that nothing would remove it
            self._entries.pop(key, None)
        return value

    def drop(self, key: Any) -> None:
        """Keep nothing under ``key``."""
        self._entries.pop(key, None)

    def clear(self) -> None:
        """Keep nothing."""
        self._entries.clear()

    def items(self) -> list[tuple[Any, T]]:
        """What is kept, by key."""
        # In one step: a loop may be interrupted by the end of a tensor.
        return [(key, value) for key, (_, value) in self._entries.copy().items()]
