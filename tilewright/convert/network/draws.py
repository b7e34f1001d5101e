"""Random numbers of one thread that are drawn again in a second run, while those of all others go on.

PyTorch's generators belong to the whole process: to rewind one repeats what other threads have drawn meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch

from tilewright.kernels.dispatch.layers import Listener

#: What the chance that a number is dropped is called, where an operator drops numbers.
_CHANCES = ("p", "dropout", "dropout_p")


class Unrepeatable(Exception):
    """Random numbers are drawn by an operator that takes no generator."""


class Draws(Listener):
    """What is drawn by this thread comes from generators of its own, which always start the same. Raises Unrepeatable.

    any: whether something was drawn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.any = False
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        drawing = func if "generator" in names else _with_generator(func)
        if given.get("generator") is not None or (drawing is None and _is_certain(names, given)):
            return func(*args, **kwargs)
        if drawing is None:
            with self:
                if (result := func.decompose(*args, **kwargs)) is NotImplemented:
                    raise Unrepeatable(str(func))
            return result
        self.any = True
        return drawing(*args, **kwargs | {"generator": self._generator_for(given)})

    def _generator_for(self, given: dict[str, Any]) -> torch.Generator:
        devices = [x.device for x in given.values() if isinstance(x, torch.Tensor)]
        device = devices[0] if devices else torch.device(given.get("device") or "cpu")
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(0)
        return self._generators[device]


def _with_generator(func: Any) -> Any | None:
    """The overload of a random operator that takes a generator, if there is one."""
    kind = func._overloadname
    name = kind.replace("_dtype", "_generator_dtype") if "_dtype" in kind else f"{kind}_generator"
    name = "generator" if kind == "default" else name
    return getattr(func.overloadpacket, name) if name in func.overloadpacket.overloads() else None


def _is_certain(names: list[str], given: dict[str, Any]) -> bool:
    """Whether an operator that drops numbers by chance drops none."""
    chances = [given.get(name, 0.0) for name in _CHANCES if name in names]
    return given.get("train") is False or chances == [0.0]
