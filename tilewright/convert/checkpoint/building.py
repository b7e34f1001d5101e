"""The unconverted model that a checkpoint is loaded into: as the user's function makes it, without memory if it can be.

The function runs on the meta device, where float weights take neither time nor memory. What people write in such
functions goes on there: moving the model to a device moves nothing, and a state dict that is loaded into it is not
read. What cannot run there, such as ``from_pretrained``, or numbers that are read from tensors, runs as it is.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tilewright.convert import structure
from tilewright.convert.layers import is_converted

logger = logging.getLogger("tilewright")
Factory = Callable[[], nn.Module]
_MOVES = (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda)
_LOADS = nn.Module._load_from_state_dict.__code__


class _WithoutMemory(TorchFunctionMode):
    """Keeps meta tensors where they are when they are asked to move, and quiet when they are loaded into."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MOVES and args[0].is_meta:
            dtype = torch._C._nn._parse_to(*args[1:], **kwargs)[1] if func is torch.Tensor.to else None
            return args[0] if dtype is None else args[0].to(dtype)
        # PyTorch warns of each meta tensor that it loads nothing into.
        if getattr(func, "__self__", None) is torch.Tensor.is_meta and sys._getframe(1).f_code is _LOADS:
            return False
        return func(*args, **kwargs)


def factory_of(given: Any) -> Factory:
    """The function that makes the unconverted model. An instance is copied, and what it holds is left alone.

    Raises TypeError for what is no such function, with what to write.
    """
    if isinstance(given, nn.Module):
        _check(given)
        return lambda: structure.copy_structure(given)
    if isinstance(given, str) or hasattr(given, "__fspath__"):
        raise TypeError(
            "load_model takes a function that builds the unconverted model, such as "
            f"lambda: AutoModel.from_pretrained({str(given)!r}), not a path"
        )
    if not callable(given):
        kind = type(given).__name__
        hint = f"such as lambda: AutoModel.from_config({'config' if 'Config' in kind else '...'})"
        raise TypeError(f"load_model takes a function that builds the unconverted model, {hint}, not a {kind}")
    try:
        inspect.signature(given).bind()
    except TypeError as error:
        name = getattr(given, "__name__", type(given).__name__)
        raise TypeError(f"load_model calls {name}() without arguments: {error}; give it lambda: {name}(...)") from None
    except ValueError:  # it does not say what it takes
        pass
    return given


def build(make: Factory) -> nn.Module:
    """The model that ``make`` makes, on the meta device if that can be. Raises TypeError for what is no plain model."""
    try:
        with torch.device("meta"), _WithoutMemory():
            model = make()
    except Exception as error:
        logger.debug("the model is built with memory for its weights, as it cannot be without: %s", error)
        model = None
    if model is None:
        model = make()
    _check(model)
    if any(not parameter.is_meta for parameter in model.parameters()):
        # Perhaps a model that is in use, as in ``lambda: model``. What cannot be copied is taken as it is.
        with contextlib.suppress(TypeError):
            return structure.copy_structure(model)
    return model


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_model's function must return the unconverted nn.Module, not a {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError("load_model takes the model as it is before torch.compile: compile what load_model returns")
    if any(map(is_converted, model.modules())):
        raise TypeError("load_model takes the model as it is before convert_model: it converts the model by itself")
