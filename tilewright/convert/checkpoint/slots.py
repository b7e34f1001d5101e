"""Every place of a model that holds a tensor, by dotted name: what a checkpoint saves, and where it puts it back.

A ``state_dict`` leaves out non-persistent buffers and tensors in plain attributes. A model built on the meta device
has no values for those either, so a checkpoint that is to give back the same model must hold them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tilewright.convert.record import join

KINDS = ("parameter", "buffer", "non_persistent", "attribute")


@dataclass(frozen=True)
class Slot:
    """One place. module: its owner. attribute: the name there. kind: one of ``KINDS``. table: holds it by that name."""

    module: nn.Module
    attribute: str
    kind: str
    table: dict[str, Any]

    @property
    def tensor(self) -> torch.Tensor:
        """What the place holds now."""
        return self.table[self.attribute]

    @property
    def held(self) -> torch.Tensor | None:
        """The same, None where it is no tensor."""
        found = self.table.get(self.attribute)
        return found if isinstance(found, torch.Tensor) else None

    def put(self, tensor: torch.Tensor) -> None:
        """Put a tensor there; a parameter must be an ``nn.Parameter``."""
        self.table[self.attribute] = tensor


def slots(model: nn.Module) -> dict[str, Slot]:
    """All places by name, in the model's order. A module that is registered twice counts under its first name."""
    found = {}
    for prefix, module in model.named_modules():
        hidden = module._non_persistent_buffers_set
        tables = (("parameter", module._parameters), ("buffer", module._buffers), ("attribute", vars(module)))
        for kind, table in tables:
            for name, value in table.items():
                if isinstance(value, torch.Tensor):
                    shown = "non_persistent" if kind == "buffer" and name in hidden else kind
                    found[join(prefix, name)] = Slot(module, name, shown, table)
    return found


def hidden_meta_tensors(model: nn.Module) -> list[str]:
    """Names of attributes that hold meta tensors in lists or dicts, where nothing can be put back by name."""
    found = []
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            if name not in ("_parameters", "_buffers") and any(
                isinstance(i, torch.Tensor) and i.is_meta for i in items
            ):
                found.append(join(prefix, name))
    return found
