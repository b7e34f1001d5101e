"""Other libraries' ways to save a model, which would write a converted one as what it is not.

``save_pretrained`` writes the state dict, and ``from_pretrained`` takes what it finds under a layer's name for a float
weight, with no more than a warning. A layer does not know what it is part of, so it looks who asks for its tensors.
"""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn

#: Methods, each with the package that its class must come from; None: any. (What a user calls ``save`` is the user's.)
METHODS = {
    "save_pretrained": None,
    "push_to_hub": None,
    "save": "sentence_transformers",
    "save_to_hub": "sentence_transformers",
}
#: Its wrappers save adapters without the model.
_ADAPTERS = "peft"


def is_foreign_save(module: nn.Module, name: str) -> bool:
    """Whether the method ``name`` of ``module`` is such a way."""
    package = METHODS.get(name, "")
    if package == "" or not callable(getattr(type(module), name, None)) or _comes_from(module, _ADAPTERS):
        return False
    return package is None or _comes_from(module, package)


def saves_adapters_alone(module: nn.Module) -> bool:
    """Whether transformers' own ways to save ``module`` leave out all but its adapters."""
    return bool(vars(module).get("_hf_peft_config_loaded"))


def refusal(module: nn.Module, name: str) -> ValueError:
    """What to raise in place of ``module.name(...)``."""
    return ValueError(
        f"{type(module).__name__}.{name} would write the tensors of converted layers under the names of float weights, "
        "as which they would be read: save a converted model with tw.save_model(model, folder) and load it with "
        f"tw.load_model(folder, make_model), or call {name} of tw.revert_model(model) "
        "(tw: import tilewright as tw)"
    )


def check_who_saves() -> None:
    """Raise ValueError if tensors of a converted layer are asked for by such a method of a module that holds it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in METHODS and code.co_argcount:
            module = frame.f_locals.get(code.co_varnames[0])
            if isinstance(module, nn.Module) and is_foreign_save(module, code.co_name):
                if saves_adapters_alone(module):
                    return
                raise refusal(module, code.co_name)
        frame = frame.f_back


def _comes_from(module: nn.Module, package: str) -> bool:
    return any(kind.__module__.partition(".")[0] == package for kind in type(module).__mro__)
