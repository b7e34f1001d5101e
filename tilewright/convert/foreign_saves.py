"""Other libraries' ways to save a model, which would write a converted one as what it is not.

``save_pretrained`` writes the state dict, and ``from_pretrained`` takes what it finds under a layer's name for a float
weight, with no more than a warning. So converted models refuse to be saved like that and name ``save_model``: an
attribute of the instance stands in front of the method. Classes are left alone, and so is what saves adapters alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tilewright.convert import layers

#: Methods, each with the package that its class must come from; None: any. (What a user calls ``save`` is the user's.)
_METHODS = {
    "save_pretrained": None,
    "push_to_hub": None,
    "save": "sentence_transformers",
    "save_to_hub": "sentence_transformers",
}
#: Its wrappers save adapters without the model.
_ADAPTERS = "peft"


class Refusal:
    """Stands in front of the method ``name`` of ``owner``, for as long as that would write quantised weights."""

    def __init__(self, owner: nn.Module, name: str):
        self.owner, self.name = owner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError where the method would write what is misread; else does what the method does."""
        if _writes_quantised(self.owner):
            kind = type(self.owner).__name__
            raise ValueError(
                f"{kind}.{self.name} would write the tensors of converted layers under the names of float weights, as "
                "which they would be read: save a converted model with tw.save_model(model, folder) and load it with "
                f"tw.load_model(folder, make_model), or call {self.name} of tw.revert_model(model) "
                "(tw: import tilewright as tw)"
            )
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)


def guard(model: nn.Module) -> None:
    """Have every part of ``model`` that holds a converted layer refuse to be saved the usual way, and no other."""
    for module in model.modules():
        for name, package in _METHODS.items():
            if not callable(getattr(type(module), name, None)) or _comes_from(module, _ADAPTERS):
                continue
            if package is not None and not _comes_from(module, package):
                continue
            if any(map(layers.is_converted, module.modules())):
                vars(module).setdefault(name, Refusal(module, name))
            elif isinstance(vars(module).get(name), Refusal):
                del vars(module)[name]


def _comes_from(module: nn.Module, package: str) -> bool:
    return any(kind.__module__.partition(".")[0] == package for kind in type(module).__mro__)


def _writes_quantised(module: nn.Module) -> bool:
    """Whether ``module`` is or holds a converted layer, outside of models of which only an adapter is saved."""
    if vars(module).get("_hf_peft_config_loaded"):
        return False
    return layers.is_converted(module) or any(map(_writes_quantised, module.children()))
