"""What a layer stores of its weight, and the float weight that is made of it when somebody needs it."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from tilewright.kernels.dispatch.derivatives import is_transformed
from tilewright.kernels.dispatch.packed import invalidate
from tilewright.kernels.dispatch.same import SameTensors, version_of


class Owner(Protocol):
    """What is asked of the layer whose weight it is; see ``WeightHolder``, which every drop-in layer is."""

    def _title(self) -> str: ...

    def _weight_size(self) -> tuple[int, ...]: ...

    def _weight_dtype(self, stored: dict[str, torch.Tensor]) -> torch.dtype: ...

    def _decoded(self, stored: dict[str, torch.Tensor]) -> torch.Tensor: ...

    def _encoded(self, weight: torch.Tensor, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...


class Stored:
    """What holds the weight of one layer, by name.

    Of all float weights that are made, the last alone is kept, and no longer than somebody holds the ``FloatWeight`` it
    was made for: a loop over the rows of one weight dequantises it once, one over the layers of a model has memory for
    one.
    """

    __slots__ = ("__weakref__", "_made", "owner", "tensors")

    def __init__(self, owner: Owner, tensors: dict[str, torch.Tensor]):
        self.owner, self.tensors = owner, tensors
        self._made: Made | None = None

    def is_that_of(self, other: Stored) -> bool:
        """Whether a write into one is a write into the other."""
        return list(map(id, self.tensors.values())) == list(map(id, other.tensors.values()))

    def made(self) -> Made:
        """The float weight as it is now."""
        global _last
        if torch._C._len_torch_dispatch_stack() or is_transformed():
            return Made(self)  # perhaps of tensors that mean nothing elsewhere
        made = self._made
        if made is None:
            made = Made(self)
            if made.value.requires_grad:  # part of a graph that may be gone by the next time
                return made
            if (before := _last()) is not None:
                before._made = None
            self._made, _last = made, weakref.ref(self)
        made.refresh()
        return made


class Made:
    """The float weight that was made of what is stored, in memory that views of it share."""

    def __init__(self, stored: Stored):
        self.stored = stored
        self.value = self._decode()
        #: Whether nobody has made something else of ``value`` than a weight of this layer.
        self.usable = True
        self._same = self._now()

    @property
    def is_ordinary(self) -> bool:
        """Whether a view of it may be used later: not where it is no real tensor, as in a transformation."""
        return type(self.value) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(self.value)

    def _decode(self) -> torch.Tensor:
        tensors = self.stored.tensors
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
            return self.stored.owner._decoded(tensors)
        with torch.inference_mode(False), torch.no_grad():  # so that writes into it are counted
            return self.stored.owner._decoded(tensors)

    def _now(self) -> SameTensors | None:
        held = list(self.stored.tensors.values())
        return SameTensors(held) if all(version_of(tensor) >= 0 for tensor in held) else None

    def refresh(self) -> None:
        """Make it anew, in place, if what is stored has changed since, or may have. Raises RuntimeError where that
        cannot be.
        """
        if self.usable and self._same is not None and self._same.match(list(self.stored.tensors.values())):
            return
        if not self.usable or self.value.requires_grad:
            raise RuntimeError(f"{self.stored.owner._title()} has changed since it was read: read it anew")
        with torch.inference_mode(False), torch.no_grad():
            self.value.copy_(self.stored.owner._decoded(self.stored.tensors))
        self._same = self._now()

    def write(self, differentiated: bool) -> None:
        """Store what somebody has written into it. differentiated: as part of a graph."""
        owner = self.stored.owner
        if differentiated:
            raise RuntimeError(
                f"what is written into {owner._title()} is stored in another form, which would lose "
                "its gradient: write under torch.no_grad(), or detach it"
            )
        if not self.usable:
            raise RuntimeError(f"{owner._title()} keeps its size and its memory: use copy_")
        for name, new in owner._encoded(self.value, self.stored.tensors).items():
            overwrite(self.stored.tensors[name], new)

    def discard(self) -> None:
        """Make it anew next time: what was written is not stored to the bit."""
        self._same = None
        self.usable = self.usable and not self.value.requires_grad
        if self.stored._made is self:
            self.stored._made = None


def _nothing() -> Stored | None:
    return None


#: Finds the ``Stored`` whose float weight is kept.
_last: Callable[[], Stored | None] = _nothing


_local = threading.local()


@contextlib.contextmanager
def noting_reads() -> Iterator[list[Owner]]:
    """While this is open, the layers whose ``weight`` is asked for in this thread are listed."""
    reads: list[Owner] = []
    before, _local.reads = getattr(_local, "reads", None), reads
    try:
        yield reads
    finally:
        _local.reads = before


def note_read(owner: Owner) -> None:
    """Tell whoever notes reads of this one."""
    reads: list[Owner] | None = getattr(_local, "reads", None)
    if reads is not None:
        reads.append(owner)


def overwrite(tensor: torch.Tensor, new: torch.Tensor) -> None:
    """Write ``new`` into ``tensor`` such that whoever remembers something of it sees that."""
    if tensor is new:
        return
    inference = tensor.is_inference()
    with torch.inference_mode(inference), torch.no_grad():
        tensor.copy_(new)
    if inference:  # which no version counts
        invalidate(tensor)
