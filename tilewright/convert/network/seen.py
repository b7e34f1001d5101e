"""What convolutions were called on and what they returned, held so that the network need not run again to show it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tilewright.convert.calibrate import Memory
from tilewright.kernels.dispatch.same import version_of

#: The name of a layer, what its call is given, and what it returns.
Shown = tuple[str, tuple[Any, ...], torch.Tensor]


class SeenCall:
    """The calls of layers in one call of a region, in their order. memory: where their tensors are counted.

    Tensors are held as they are, not copied: ``intact`` says whether somebody has written to them since.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._shown: list[Shown] | None = []
        self._versions: list[tuple[torch.Tensor, int]] = []
        self._counted: set[int] = set()

    def add(self, layer: str, given: tuple[Any, ...], value: torch.Tensor) -> None:
        """Hold one more call, if there is room for it; if there is none, nothing is held from now on."""
        if self._shown is None:
            return
        tensors = [x for x in pytree.tree_leaves((given, value)) if isinstance(x, torch.Tensor)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        size = sum(count for address, count in storages.items() if address not in self._counted)
        versions = [(x, version_of(x)) for x in tensors]
        if any(version < 0 for _, version in versions) or not self._memory.take(self, size):
            self.release()
            return
        self._counted |= storages.keys()
        self._versions += versions
        self._shown.append((layer, given, value))

    def intact(self) -> bool:
        """Whether every call is held, with the values that it had."""
        return self._shown is not None and all(version_of(x) == version for x, version in self._versions)

    def shown(self) -> Iterator[Shown]:
        """Every call, each let go of when the next is asked for."""
        shown = self._shown or []
        self._versions.clear()
        while shown:
            yield shown.pop(0)
        self.release()

    def release(self) -> None:
        """Let go of everything."""
        self._shown = None
        self._versions.clear()
        self._memory.give_back(self)
