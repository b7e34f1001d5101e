"""Copies of functions that find something else under some of their global names.

To have ``isinstance`` answer for symbolic values, or a function that cannot be read show as one call, others write into
the module where the name lies, where every thread sees it. Here the code is given another dictionary of globals.
"""

from __future__ import annotations

import builtins
import random
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from tilewright.convert.code import assigns_globals, content, is_of_torch, names_in

_MISSING = object()
#: Modules whose functions answer otherwise each time they are asked.
_CHANGING = (random, time)


class _Changing:
    """Stands for a module of ``_CHANGING``, or for NumPy, of which ``random`` is one."""

    def __init__(self, module: Any, refuse: Callable[[str], NoReturn]):
        self._module, self._refuse = module, refuse

    def __getattr__(self, name: str) -> Any:
        if self._module in _CHANGING or name == "random":
            self._refuse(f"forward asks {self._module.__name__}.{name}, which answers otherwise in each call")
        return getattr(self._module, name)


class _Torch:
    """Stands for PyTorch, but for some of its functions."""

    def __init__(self, stand_ins: Mapping[str, Callable[[Any], Any]]):
        self._stand_ins = stand_ins

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        return self._stand_ins[name](found) if name in self._stand_ins else found


class Overlay:
    """stand_ins: what is found under a name, made of what was there. refuse: called with the reason where code asks for
    what cannot be read.
    """

    def __init__(self, stand_ins: Mapping[str, Callable[[Any], Any]], refuse: Callable[[str], NoReturn]):
        self._stand_ins, self._refuse = stand_ins, refuse
        self._functions: dict[int, tuple[Any, Any]] = {}
        self._spaces: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        #: Of each space, the names that code assigns to.
        self._assigned: list[tuple[dict[str, Any], str, Any]] = []

    def of(self, function: Any) -> Any:
        """``function`` with the stand-ins, or itself where it asks for none; likewise what a decorator wrapped."""
        if not isinstance(function, types.FunctionType) or is_of_torch(function):
            return function
        known = self._functions.get(id(function))
        if known is not None:
            return known[1]
        self._functions[id(function)] = function, function
        made = self._made(function)
        self._functions[id(function)] = function, made
        return made

    def assigned(self) -> list[str]:
        """Global names that the code has assigned to, in its copy of the globals."""
        return [name for space, name, value in self._assigned if space.get(name, _MISSING) is not value]

    def _made(self, function: types.FunctionType) -> types.FunctionType:
        cells = function.__closure__ or ()
        inner = [content(cell) for cell in cells]
        laid_over = [self.of(each) for each in inner]
        changed = [new is not old for new, old in zip(laid_over, inner, strict=True)]
        names, assigns = set(names_in(function.__code__)), assigns_globals(function.__code__)
        wanted = {name: new for name in names if (new := self._stand_in(function, name, names)) is not None}
        if not (wanted or assigns or any(changed)):
            return function
        space = self._space(function.__globals__)
        space |= wanted
        if assigns:
            self._assigned += [(space, name, space.get(name, _MISSING)) for name in names]
        closure = tuple(
            types.CellType(new) if other else cell for cell, new, other in zip(cells, laid_over, changed, strict=True)
        )
        made = types.FunctionType(function.__code__, space, function.__name__, function.__defaults__, closure)
        made.__kwdefaults__ = function.__kwdefaults__
        made.__dict__.update(function.__dict__)
        return made

    def _space(self, names: dict[str, Any]) -> dict[str, Any]:
        return self._spaces.setdefault(id(names), (names, dict(names)))[1]

    def _stand_in(self, function: types.FunctionType, name: str, names: set[str]) -> Any:
        found = function.__globals__.get(name, getattr(builtins, name, _MISSING))
        if found is _MISSING:
            return None
        if name in self._stand_ins:
            return self._stand_ins[name](found)
        if isinstance(found, types.FunctionType):  # which the code may call
            return new if (new := self.of(found)) is not found else None
        if found is torch:
            return _Torch(self._stand_ins) if names & self._stand_ins.keys() else None
        if isinstance(found, types.ModuleType):
            return _Changing(found, self._refuse) if found in _CHANGING or found.__name__ == "numpy" else None
        if isinstance(getattr(found, "__self__", None), random.Random) or getattr(found, "__module__", "") == "time":
            return lambda *_, **__: self._refuse(f"forward asks {name}, which answers otherwise in each call")
        return None
