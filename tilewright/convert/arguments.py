"""What people give ``convert_model`` and its relatives by mistake, and the words that say what was meant."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.jit._trace import TopLevelTracedModule

from tilewright.convert import structure
from tilewright.convert.recipes import PRESETS, Pattern, Recipe
from tilewright.convert.schemes import Scheme
from tilewright.convert.text import display_name, listed


def check_module(model: object) -> None:
    """Raise TypeError for what is no ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is an nn.Module, not {_what_it_is(model)}")


def check_model(model: object) -> None:
    """Raise TypeError for what is no ``nn.Module``, or one whose layers cannot be replaced."""
    check_module(model)
    if isinstance(model, torch.jit.ScriptModule):
        made = "traced" if isinstance(model, TopLevelTracedModule) else "scripted"
        raise TypeError(f"a {made} model cannot be converted: convert the module it was {made} from")
    if hasattr(model, "_orig_mod"):
        raise TypeError("the model is compiled: convert first, then torch.compile the result")


def _what_it_is(model: object) -> str:
    """What came in place of a model, and what to do."""
    kind = type(model).__name__
    if isinstance(model, type):
        return f"the class {model.__name__}: make an instance, {model.__name__}(...)"
    if model is None:
        return "None: what made it returned nothing"
    if isinstance(model, (Recipe, Scheme)) or (isinstance(model, str) and model in PRESETS):
        return f"a recipe: the model comes first, convert_model(model, {model if isinstance(model, str) else '...'!r})"
    if isinstance(model, (str, os.PathLike)):
        return (
            f"{str(model)!r}: load it first, as by AutoModel.from_pretrained(...), or by load_model(folder, factory) "
            "if save_model wrote it"
        )
    if isinstance(model, Mapping):
        if model and all(isinstance(value, torch.Tensor) for value in model.values()):
            return f"{kind}, a state dict: load it into a model, model.load_state_dict(...), and convert that"
        return f"{kind}; nn.ModuleDict makes a module of modules by name"
    if isinstance(model, (list, tuple)):
        return f"{kind}: convert each of its modules, or nn.ModuleList(...) of them"
    if isinstance(model, torch.export.ExportedProgram):
        return "ExportedProgram: convert the module, then torch.export it"
    if inside := [name for name, value in _attributes(model).items() if isinstance(value, nn.Module)]:
        name = "model" if "model" in inside else inside[0]
        return (
            f"{kind}; it holds modules called {listed(inside)}: convert those and put them back, "
            f"x.{name} = convert_model(x.{name}, ...)"
        )
    return f"{kind}: call it, if it makes the model" if inspect.isroutine(model) else kind


def _attributes(value: object) -> Mapping[str, Any]:
    return getattr(value, "__dict__", {})


def check_switches(**switches: object) -> None:
    """Raise TypeError for a value that is neither True nor False."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            hint = "; a rule with its name converts one head: {'lm_head': 'int8', '*': 'int8'}" * (name == "heads")
            raise TypeError(f"{name} is True or False, not {value!r}{hint}")


def checked_bytes(name: str, value: object) -> int:
    """``value``, a number of bytes. Raises TypeError for what is no integer, ValueError for one below 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is a number of bytes, such as 2**30, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} is a number of bytes from 1 on, not {value!r}")
    return value


def excluded(model: nn.Module, exclude: Any) -> tuple[Pattern, ...]:
    """The patterns that ``exclude`` holds. Raises TypeError for a module, with the name to write for it."""
    if exclude is None:
        return ()
    if isinstance(exclude, nn.Module):
        exclude = [exclude]
    if isinstance(exclude, (str, type)):
        return (exclude,)
    if isinstance(exclude, Mapping) or not isinstance(exclude, Iterable):
        raise TypeError(f"exclude is a pattern or several in a list, not {exclude!r}")
    patterns = tuple(exclude)
    names = structure.names_of_modules(model)
    for pattern in patterns:
        if isinstance(pattern, nn.Module):
            kind, known = type(pattern).__name__, names.get(pattern, [])
            spelt = f"write {display_name(known[0])!r}" if known else f"and {type(model).__name__} does not hold it"
            raise TypeError(f"exclude takes names and patterns, not modules: {spelt} for this {kind}")
    return patterns


def checked_filter(filter_fn: Any) -> Callable[[nn.Module, str], bool] | None:
    """``filter_fn``, whose answers are looked at. Raises TypeError for what cannot be called as one."""
    if filter_fn is None:
        return None
    called = "filter_fn is called as filter_fn(module, name)"
    if not callable(filter_fn) or isinstance(filter_fn, (type, nn.Module)):
        raise TypeError(f"{called}, and returns True or False; {filter_fn!r} does not")
    try:
        signature = inspect.signature(filter_fn)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        try:
            signature.bind(None, "")
        except TypeError as error:
            raise TypeError(f"{called}; this one takes {signature}: {error}") from error

    def checked(module: nn.Module, name: str) -> bool:
        answer = filter_fn(module, name)
        if answer is None:
            raise TypeError(f"{called}, and returns True or False; for {display_name(name)!r} it returned None")
        return bool(answer)

    return checked
