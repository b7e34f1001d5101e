"""Attention of converted transformers: the C kernel for short sequences instead of PyTorch's.

Once its linear layers are int8, a sentence encoder on a CPU spends a third of its time in PyTorch's attention, whose
arithmetic is a fiftieth of the whole. The models of transformers look their attention up by a name in their config, so
a converted model that says "sdpa" there is given the name of a function that calls ``kernels.attention.call``, which
computes the same, within float32 rounding. Everything else keeps the attention it has: another choice of the user, a
model whose code asks whether the name is "sdpa", a GPU, training.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tilewright.kernels.attention import call

NAME = "tilewright"
#: What it stands in for.
REPLACED = "sdpa"
_FIELD = "_attn_implementation_internal"
#: What the function that it stands in for may be asked to do.
_KNOWN = {
    *("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal"),
    *("position_bias", "cache", "softcap", "kwargs"),
}


class _Name(str):
    """The name in a config. Copying or unpickling it registers the function: a model from a file finds it."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[[], str], tuple[()]]:
        return _registered_name, ()


def _registered_name() -> str:
    if not _register():
        return REPLACED  # read by a version of transformers that cannot be told of other attentions
    return _Name(NAME)


def _register() -> bool:
    """Make the name known to transformers, if that is imported and has a place for it."""
    utils, masks = (sys.modules.get(f"transformers.{name}") for name in ("modeling_utils", "masking_utils"))
    functions = getattr(utils, "ALL_ATTENTION_FUNCTIONS", None)
    mask_functions = getattr(masks, "ALL_MASK_ATTENTION_FUNCTIONS", None)
    if functions is None or mask_functions is None or not hasattr(functions, "register"):
        return False
    if REPLACED not in functions or REPLACED not in mask_functions:
        return False
    if not set(inspect.signature(functions[REPLACED]).parameters) <= _KNOWN:
        return False  # a version that does more than this file knows of
    if NAME not in functions:
        functions.register(NAME, attention_forward)
        mask_functions.register(NAME, mask_functions[REPLACED])
    return True


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [batch, heads, length, width], key and value likewise -> ([batch, length, heads, width], None): what
    transformers calls. Whatever our attention does not take goes to the function that it stands in for.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    length, causal = query.shape[2], is_causal
    if causal is None:
        causal = getattr(module, "is_causal", True)
    causal = bool(causal) and attention_mask is None and length > 1
    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if special or dropout or kwargs.get("output_attentions") or (causal and key.shape[2] != length):
        supports = False
    else:
        supports = call.supports(query, key, value, attention_mask, causal)
    if supports:
        y = call.attention(query, key, value, attention_mask, causal, scaling)
        return y.transpose(1, 2).contiguous(), None
    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    return ALL_ATTENTION_FUNCTIONS[REPLACED](module, query, key, value, attention_mask, **options)


def use(model: nn.Module) -> list[str]:
    """Have the attention of ``model`` computed by ours where it may be; returns the names of its attention modules."""
    if not _register():
        return []
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        owners.setdefault(id(vars(module).get("config")), []).append(module)
    asks = functools.cache(_asks_for_the_name)
    names = []
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if "Attention" not in type(module).__name__ or getattr(config, _FIELD, None) not in (REPLACED, NAME):
            continue
        if not any(asks(type(owner).__module__) for owner in owners[id(config)]):
            setattr(config, _FIELD, _Name(NAME))
            names.append(name)
    return names


def restore(model: nn.Module) -> None:
    """Undo ``use``."""
    for module in model.modules():
        config = vars(module).get("config")
        if config is not None and getattr(config, _FIELD, None) == NAME:
            setattr(config, _FIELD, REPLACED)


def _asks_for_the_name(module: str) -> bool:
    """Whether the source of the Python module has the name in it: then the code may do something else for others."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return True
    return f'"{REPLACED}"' in source or f"'{REPLACED}'" in source
