"""What a graph takes for granted about the modules whose code is in it: their numbers, words and modes.

``forward`` reads ``self.scale`` and the graph has its value. So the values that the code names are remembered where the
graph is made, and a program asks before each call whether they are the same still.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn

from tilewright.convert.code import is_somebodys, names_in, names_in_code_of
from tilewright.convert.contents import is_constant, is_plain_object
from tilewright.convert.graph import behind

#: Numbers and words that modules of any kind give to operators: a recording has them as they were.
_RECORDED = ("eps", "normalized_shape", "activation", "is_causal")


@dataclass(frozen=True)
class Assumed:
    """An attribute of the module at ``path`` has a value. via: the attribute whose object has it, such as "config"."""

    path: str
    via: str | None
    name: str
    value: Any


def assumptions(owner: nn.Module, called: Iterable[str]) -> list[Assumed]:
    """About ``owner`` and all below it but what lies in the modules that a graph calls, whose own code runs."""
    inside = {part for path in called for part in owner.get_submodule(path).modules()}
    found: list[Assumed] = []
    objects: dict[int, tuple[str, str, Any, set[str]]] = {}
    for path, module in owner.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module not in inside:
            found.append(Assumed(path, None, "training", False))
        found += [Assumed(path, None, name, vars(module)[name]) for name in _RECORDED if name in vars(module)]
        if module in inside or not is_somebodys(module):
            continue
        names = names_in_code_of(type(module))
        if "training" in names and module is not owner:
            found.append(Assumed(path, None, "training", False))
        for name in sorted(names & vars(module).keys() - {"training", "forward", *_RECORDED}):
            value = behind(vars(module)[name])
            if _is_plain(value):
                found.append(Assumed(path, None, name, copy.copy(value)))
            elif is_plain_object(value):
                objects.setdefault(id(value), (path, name, value, set()))[3].update(
                    names | _behind_properties(value, names)
                )
    for path, via, value, names in objects.values():
        inner = {key: each for key, each in vars(value).items() if key in names and _is_plain(each)}
        found += [Assumed(path, via, key, copy.copy(each)) for key, each in inner.items()]
    return found


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is a number, a word or the like, or a list or dictionary of such."""
    if type(value) in (list, set):
        return all(map(is_constant, value))
    return all(map(is_constant, value.values())) if type(value) is dict else is_constant(value)


def place_of(owner: nn.Module, assumed: Assumed) -> dict[str, Any]:
    """The dictionary in which the attribute lies."""
    held = vars(owner.get_submodule(assumed.path))
    return held if assumed.via is None else vars(behind(held[assumed.via]))


def _behind_properties(value: Any, names: set[str]) -> set[str]:
    """What the properties of an object read that are among ``names``."""
    found = {name: getattr(type(value), name, None) for name in names}
    getters = [each.fget for each in found.values() if isinstance(each, property)]
    return {name for getter in getters if isinstance(getter, FunctionType) for name in names_in(getter.__code__)}
