"""How much a calibration may hold of what reaches layers, counted as it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tilewright.convert.state import private_copy

#: Bytes, unless somebody says otherwise.
CALIBRATION_MEMORY = 2**30
#: Of the random number that says whether a row stays.
_KEY_BYTES = 4


class Memory:
    """limit: bytes that may be held. held, most: that are held now, and that were at any time.

    Rows get at most a half of it, and say beforehand how many there may be; the inputs of networks get what is left,
    and what else is seen in them what those leave.
    """

    def __init__(self, limit: int = CALIBRATION_MEMORY) -> None:
        self.limit = limit
        self.held = self.most = 0
        self._for_rows = self._for_inputs = self._taken = 0
        self._by_owner: dict[int, int] = {}

    def count(self, owner: object, *tensors: torch.Tensor) -> None:
        """From now on ``owner`` holds these and no others."""
        size = bytes_of(tensors)
        self.held += size - self._by_owner.get(id(owner), 0)
        self._by_owner[id(owner)] = size
        self.most = max(self.most, self.held)

    def rows_of_each(self, layers: Mapping[str, nn.Module], most: int) -> int:
        """How many of the rows that reach each of these linear layers may be kept: at least one, at most ``most``."""
        row = sum(map(_row_bytes, layers.values()))
        rows = max(1, min(most, self.limit // 2 // row)) if row else most
        self._for_rows = rows * row
        return rows

    def keep(self, kept: list[Any], given: Any) -> bool:
        """Append a copy of the tensors in ``given`` to ``kept``, if that is empty or there is room. Returns whether it
        did.
        """
        size = bytes_of(given)
        if kept and self._for_inputs + self._taken + size > self.limit - self._for_rows:
            return False
        self._for_inputs += size
        kept.append(private_copy(given))
        self.count(kept[-1], *(x for x in pytree.tree_leaves(kept[-1]) if isinstance(x, torch.Tensor)))
        return True

    def take(self, owner: object, size: int) -> bool:
        """Let ``owner`` hold ``size`` bytes more, if there is room beside rows and inputs: whether there was."""
        if self._for_rows + self._for_inputs + self._taken + size > self.limit:
            return False
        self._taken += size
        self.held += size
        self._by_owner[id(owner)] = self._by_owner.get(id(owner), 0) + size
        self.most = max(self.most, self.held)
        return True

    def give_back(self, owner: object) -> None:
        """``owner`` holds nothing of what it took any more."""
        size = self._by_owner.pop(id(owner), 0)
        self._taken -= size
        self.held -= size

    def drop(self, kept: list[Any]) -> None:
        """Take back what was appended last."""
        self._for_inputs -= bytes_of(kept[-1])
        self.held -= self._by_owner.pop(id(kept.pop()), 0)


def bytes_of(tree: Any) -> int:
    """Bytes of the values of all tensors in ``tree``."""
    return sum(x.numel() * x.element_size() for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor))


def _row_bytes(layer: nn.Module) -> int:
    """Of a row of a linear layer's input."""
    weight = layer._parameters.get("weight")
    features = getattr(layer, "in_features", None) or getattr(layer, "nx", None)  # of Conv1D
    if weight is None or features is None:
        return 0
    return int(features) * weight.element_size() + _KEY_BYTES
