"""Every place of a model that holds a tensor, by dotted name: what a checkpoint saves, and where it puts it back.

A ``state_dict`` leaves out non-persistent buffers and tensors in plain attributes. A model built on the meta device
has no values for those either, so a checkpoint that is to give back the same model must hold them too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from tilewright.convert.record import join

KINDS = ("parameter", "buffer", "non_persistent", "attribute")


@dataclass(frozen=True)
class Slot:
    """One place. module: its owner. attribute: the name there. kind: one of ``KINDS``."""

    module: nn.Module
    attribute: str
    kind: str

    @property
    def tensor(self) -> torch.Tensor:
        """What the place holds now."""
        if self.kind == "parameter":
            return self.module._parameters[self.attribute]  # type: ignore[return-value]
        if self.kind == "attribute":
            return vars(self.module)[self.attribute]
        return self.module._buffers[self.attribute]  # type: ignore[return-value]

    def put(self, tensor: torch.Tensor) -> None:
        """Put a tensor there; a parameter must be an ``nn.Parameter``."""
        if self.kind == "parameter":
            self.module._parameters[self.attribute] = tensor  # type: ignore[assignment]
        elif self.kind == "attribute":
            vars(self.module)[self.attribute] = tensor
        else:
            self.module._buffers[self.attribute] = tensor


def slots(model: nn.Module) -> dict[str, Slot]:
    """All places by name, in the model's order. A module that is registered twice counts under its first name."""
    return dict(_slots(model))


def _slots(model: nn.Module) -> Iterator[tuple[str, Slot]]:
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield join(prefix, name), Slot(module, name, "parameter")
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind = "non_persistent" if name in module._non_persistent_buffers_set else "buffer"
                yield join(prefix, name), Slot(module, name, kind)
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield join(prefix, name), Slot(module, name, "attribute")


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
