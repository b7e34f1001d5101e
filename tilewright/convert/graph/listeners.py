"""Hooks that tell the code around them what they hear.

A graph shows a module that a hook watches as one call, and its code is read without the hook. That is right for as long
as what the hook hears goes elsewhere; transformers has hooks which put hidden states where ``forward`` picks them up.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tilewright.convert.code import content, functions_behind, is_somebodys, methods_of, names_in
from tilewright.convert.contents import children, is_constant

_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def told_by_hooks(modules: Mapping[str, nn.Module], called: Iterable[str]) -> frozenset[str]:
    """Paths of modules whose code may read what hooks on or inside of the modules ``called`` have heard: it names an
    object that the hook names too. What is called shows as one call; the code of the others is read.
    """
    hooks = {path: [h for name in _TABLES for h in vars(each)[name].values()] for path, each in modules.items()}
    if not any(hooks.values()):
        return frozenset()
    called = tuple(called)
    opaque = {path for path in modules if path in called or path.startswith(tuple(f"{each}." for each in called))}
    heard = _reached([hook for path in opaque for hook in hooks[path]])
    return frozenset(
        path
        for path, module in modules.items()
        if path not in opaque and is_somebodys(module) and heard & _reached_by_code(module)
    )


def _reached_by_code(module: nn.Module) -> set[int]:
    tables = ("_parameters", "_buffers", "_modules")
    held = [each for name, each in vars(module).items() if "_hooks" not in name and name not in tables]
    return _reached([*methods_of(type(module)).values(), *held]) | {id(module)}


def _reached(values: Iterable[Any]) -> set[int]:
    """What functions and objects lead to that could hold something later, by ``id``; of modules nothing but them."""
    found: set[int] = set()
    functions: set[types.FunctionType] = set()
    stack = list(values)
    while stack:
        each = stack.pop()
        if isinstance(each, types.MethodType):
            stack += [each.__self__, each.__func__]
        elif isinstance(each, functools.partial):
            stack += [each.func, *each.args, *each.keywords.values()]
        elif isinstance(each, types.FunctionType):
            for function in set(functions_behind(each)) - functions:
                functions.add(function)
                stack += [*map(content, function.__closure__ or ()), *(function.__defaults__ or ())]
                named = map(function.__globals__.get, set(names_in(function.__code__)))
                stack += [value for value in named if not isinstance(value, types.FunctionType)]
        elif id(each) not in found and not is_constant(each) and not isinstance(each, (torch.Tensor, logging.Logger)):
            found.add(id(each))
            stack += children(each) or []
    return found
