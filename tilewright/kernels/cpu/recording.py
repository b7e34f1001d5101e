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
            recorder.suspended = True
            try:
                result = function(*args, **kwargs)
            finally:
                recorder.suspended = False
            recorder.calls.append(Call(f"step {step}", function, args, kwargs, result))
            return result

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


def record(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> tuple[list[Call], Any]:
    """What ``function`` calls for these inputs, and what it returns."""
    recorder = _Recorder()
    _local.recorder = recorder
    try:
        with recorder:
            result = function(*inputs)
    finally:
        _local.recorder = None
    return recorder.calls, result
