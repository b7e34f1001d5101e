"""What lies outside of a model and its code may write all the same: attributes of classes, global lists and numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import nn

from tilewright.convert.code import assigns_globals, content, functions_behind, is_somebodys, methods_of, names_in
from tilewright.convert.contents import Contents, changed_keys, is_same

_MISSING = object()


class Outside:
    """As it is now. Only what the code of ``modules`` names: their classes; under global names and in closures lists,
    dictionaries, sets, other modules' classes, and whatever else it assigns to.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        modules = [module for module in modules if is_somebodys(module)]
        kinds = {type(module) for module in modules}
        functions = [f for module in modules for value in vars(module).values() for f in functions_behind(value)]
        functions += [f for kind in kinds for method in methods_of(kind).values() for f in functions_behind(method)]
        found: list[Any] = []
        self._globals: list[tuple[dict[str, Any], str, Any]] = []
        for function in dict.fromkeys(functions):
            space, names = function.__globals__, set(names_in(function.__code__))
            found += [*map(content, function.__closure__ or ()), *map(space.get, names)]
            if assigns_globals(function.__code__):
                self._globals += [(space, name, space.get(name, _MISSING)) for name in names]
        kinds |= {value for value in found if isinstance(value, type) and issubclass(value, nn.Module)}
        bases = {base for kind in kinds for base in kind.__mro__ if base is not object}
        self._classes = [(b, dict(vars(b))) for b in bases if not b.__module__.startswith(("torch.", "tilewright."))]
        self._contents = Contents([each for each in found if isinstance(each, (list, dict, set, deque))], deep=False)

    def changed(self) -> list[str]:
        """What holds something else now, in words."""
        words = ["into a list or dictionary outside of the module"] if self._contents.changed() else []
        for base, before in self._classes:
            words += [f"{key!r} of the class {base.__name__}" for key in changed_keys(before, dict(vars(base)))]
        return words + [
            f"the global {name!r}"
            for space, name, value in self._globals
            if not is_same(space.get(name, _MISSING), value)
        ]

    def restore(self) -> None:
        """Put back what was there."""
        self._contents.restore()
        for base, before in self._classes:
            for key in changed_keys(before, dict(vars(base))):
                setattr(base, key, before[key]) if key in before else delattr(base, key)
        for space, name, value in self._globals:
            if value is _MISSING:
                space.pop(name, None)
            elif not is_same(space.get(name, _MISSING), value):
                space[name] = value
