"""Calls of an operator that come again with the same weights: straight to a C kernel that was prepared for them.

What ``eager`` does for a layer that is called from Python, this does for an operator that a compiled graph calls: there
is no layer there, but the same tensors come each time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tilewright.kernels.dispatch import router

Call = Callable[..., torch.Tensor]
_CPU = torch.device("cpu")
_PLAIN = (torch.Tensor, torch.nn.Parameter)
#: Weights whose calls are remembered, and shapes and dtypes of x and the residual for each of them.
_MOST_WEIGHTS = 4096
_MOST_SHAPES = 64


class _Known:
    """What is known of the calls with one weight. others: the arguments but x and the residual."""

    def __init__(self, others: Sequence[Any], named: Mapping[str, Any]):
        self.generation = router.generation()
        self.tensors = [
            (i, weakref.ref(each), each._version, each.data_ptr())
            for i, each in enumerate(others)
            if isinstance(each, torch.Tensor)
        ]
        self.values = [(i, each) for i, each in enumerate(others) if not isinstance(each, torch.Tensor)]
        self.named = dict(named)
        self.calls: dict[Any, Call | None] = {}
        self.gone: weakref.ref[torch.Tensor] | None = None

    def holds(self, others: Sequence[Any], named: Mapping[str, Any]) -> bool:
        """Whether ``others`` and ``named`` are the arguments this is known of, and unwritten."""
        if (
            self.generation != router.generation()
            or len(others) != len(self.tensors) + len(self.values)
            or self.named != named
        ):
            return False
        for i, ref, version, address in self.tensors:
            tensor, known = others[i], ref()
            if known is None or tensor is not known or known._version != version or known.data_ptr() != address:
                return False
        return all(others[i] is value or _same(others[i], value) for i, value in self.values)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, torch.Tensor) and bool(a == b)


class Repeats:
    """Remembers the calls of one operator, whose first argument is x and whose second is the weight.

    residual: the position of that argument. prepare: from the arguments by name to the function of x and the residual
    that serves calls of that shape, or None. bind: from what the dispatcher gives to all arguments by name.
    """

    def __init__(
        self,
        residual: int,
        prepare: Callable[[Mapping[str, Any]], Call | None],
        bind: Callable[[tuple[Any, ...], Mapping[str, Any]], Mapping[str, Any]],
    ):
        self.residual, self.prepare, self.bind = residual, prepare, bind
        self._known: dict[int, _Known] = {}

    def find(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> Call | None:
        """The function of x and the residual that serves the call, or None: then the operator is to be called.

        The first call with an x of some shape always goes to the operator, which checks everything.
        """
        x, weight = args[0], args[1]
        others = (*args[1 : self.residual], *args[self.residual + 1 :])
        residual = args[self.residual] if len(args) > self.residual else None
        key = (x.shape, x.dtype) if residual is None else (x.shape, x.dtype, residual.shape, residual.dtype)
        known = self._known.get(id(weight))
        if known is None or not known.holds(others, named):
            self._remember(others, named, key)
            return None
        if key in known.calls:
            call = known.calls[key]
            if call is not None:
                return call
            if x.numel():
                known.calls[key] = call = self.prepare(self.bind(args, named))
            return call
        if len(known.calls) >= _MOST_SHAPES:
            known.calls.clear()
        known.calls[key] = None
        return None

    def _remember(self, others: Sequence[Any], named: Mapping[str, Any], key: Any) -> None:
        weight = others[0]
        for each in others:
            # Writes into inference tensors leave no trace, and subclasses dispatch for themselves.
            if isinstance(each, torch.Tensor) and (
                type(each) not in _PLAIN or each.is_inference() or each.device != _CPU
            ):
                return
        if len(self._known) >= _MOST_WEIGHTS:
            self._known.clear()
        known = self._known[id(weight)] = _Known(others, named)
        known.calls[key] = None
        number, entries = id(weight), self._known

        # Ids are handed out again: the entry goes with its weight.
        def drop(gone: Any) -> None:
            if number in entries and entries[number].gone is gone:
                del entries[number]

        known.gone = weakref.ref(weight, drop)
