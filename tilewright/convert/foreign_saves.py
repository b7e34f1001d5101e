"""Converted models refuse to be saved by other libraries before anything is written.

An attribute of the instance stands in front of the method; classes are left alone, and so is what saves adapters alone.
Models of which a part was converted by itself are noticed by the layers (``nn.foreign_saves``).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tilewright.convert import layers
from tilewright.nn import foreign_saves


class Refusal:
    """Stands in front of the method ``name`` of ``owner``, for as long as that would write quantised weights."""

    def __init__(self, owner: nn.Module, name: str):
        self.owner, self.name = owner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError where the method would write what is misread; else does what the method does."""
        if _writes_quantised(self.owner):
            raise foreign_saves.refusal(self.owner, self.name)
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)


def guard(model: nn.Module) -> None:
    """Have every part of ``model`` that holds a converted layer refuse to be saved the usual way, and no other."""
    for module in model.modules():
        for name in foreign_saves.METHODS:
            if not foreign_saves.is_foreign_save(module, name):
                continue
            if any(map(layers.is_converted, module.modules())):
                vars(module).setdefault(name, Refusal(module, name))
            elif isinstance(vars(module).get(name), Refusal):
                del vars(module)[name]


def _writes_quantised(module: nn.Module) -> bool:
    """Whether ``module`` is or holds a converted layer, outside of models of which only an adapter is saved."""
    if foreign_saves.saves_adapters_alone(module):
        return False
    return layers.is_converted(module) or any(map(_writes_quantised, module.children()))
