"""Records which operators a function calls, and the functions that stand for a step of a replay."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from tilewright.kernels.cpu.replay_steps import IN_PLACE, NATIVE
from tilewright.kernels.dispatch.layers import Listener

_local = threading.local()

#: Calls of functions marked with ``of_holder`` and ``reads_held``.
HOLDER, HELD = "call of a holder", "call with what is held"


#: Of functions marked with ``of_holder`` and ``reads_held``: what was said of them.
ROOM_OF: dict[Callable[..., Any], Callable[..., Any]] = {}
ATTENTION_OF: dict[Callable[..., Any], Callable[..., Any]] = {}


class Call(NamedTuple):
    """One recorded call. name: of the operator, or of the step of a function marked with ``recorded``."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class _Recorder(Listener):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.suspended = False
        #: Storages of what holders gave.
        self.held: set[int] = set()

    def note(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``function`` as one call of that name, whatever it calls."""
        self.suspended = True
        try:
            result = function(*args, **kwargs)
        finally:
            self.suspended = False
        args = args[1:] if name == HOLDER else args
        self.calls.append(Call(name, function, args, kwargs, result))
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.suspended:
            self.calls.append(Call(str(func), func, args, kwargs, result))
        return result


def recorded(step: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a recording see a call of a function (of tensors, without side effects but those of ``IN_PLACE``) as one
    ``step`` of ``NATIVE``, which computes the same from the same arguments. What a function is called says nothing of
    what it computes.
    """
    if f"step {step}" not in NATIVE:
        raise ValueError(f"there is no step {step!r}")

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # its name too, by which it is pickled
        def run(*args: Any, **kwargs: Any) -> Any:
            recorder: _Recorder | None = getattr(_local, "recorder", None)
            if recorder is None or recorder.suspended:
                return function(*args, **kwargs)
            return recorder.note(f"step {step}", function, args, kwargs)

        return run

    return mark


def of_holder(room: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a recording see a call of a function as one that is made from Python in each replay. The first argument is
    somebody's object, another one in each replay, which may keep what it is given and decides what it gives, tensors of
    any size.

    room: a function of the same arguments. Either it gives what a call would, tensors in which what the
    caller has brought is for him to write from position ``first`` on, as (keys, values, first), and leaves the object
    as a call would; or it does nothing and gives None.
    """

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        ROOM_OF[function] = room

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            recorder: _Recorder | None = getattr(_local, "recorder", None)
            if recorder is None or recorder.suspended:
                return function(*args, **kwargs)
            result = recorder.note(HOLDER, function, args, kwargs)
            recorder.held.update(tensor.untyped_storage().data_ptr() for tensor in tensors_in(result))
            return result

        return run

    return mark


def reads_held(attention: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a recording see a call of a function as one that is made from Python in each replay, if it is given what an
    ``of_holder`` function gave: then it may do other operators each time, but for the size of its results.

    attention: gives of the same arguments query, key, value, mask, scale and sinks of the ``attention`` whose result,
    heads merged, is that of the function, or None where it may be another.
    """

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        ATTENTION_OF[function] = attention

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            recorder: _Recorder | None = getattr(_local, "recorder", None)
            if recorder is None or recorder.suspended or not recorder.held:
                return function(*args, **kwargs)
            if not any(tensor.untyped_storage().data_ptr() in recorder.held for tensor in tensors_in((args, kwargs))):
                return function(*args, **kwargs)
            return recorder.note(HELD, function, args, kwargs)

        return run

    return mark


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of ``tree``."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def written_by(call: Call) -> list[torch.Tensor]:
    """What a call writes to, of what it is given."""
    if call.name in IN_PLACE:
        return [call.args[0]]
    schema = getattr(call.function, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in schema.arguments), call.args, strict=False)) | call.kwargs
    names = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    return tensors_in([given.get(name) for name in names])


def record(function: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[list[Call], Any]:
    """What ``function`` calls for these inputs, and what it returns."""
    recorder = _Recorder()
    _local.recorder = recorder
    try:
        with recorder:
            result = function(*inputs)
    finally:
        _local.recorder = None
    return recorder.calls, result
