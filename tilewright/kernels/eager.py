"""Calls operators of the package without PyTorch's dispatcher where nothing but the call itself would happen.

The dispatcher costs 8 us a call, a third of a small linear layer. It is needed whenever somebody looks at the operator:
to differentiate it, cast its arguments, trace, export, compile, batch or profile it. In eager inference on CPU tensors
nobody does, and the operator's own kernel, which checks its arguments and asks the router, is called at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewright.kernels.operators import NAMESPACE, kernel_of

_CPU = torch.device("cpu")


def _probe() -> tuple[Callable[[], Any], ...]:
    """What tells whether somebody looks: functions that return something false where nobody does. Raises AttributeError
    where this version of PyTorch lacks one.
    """
    forward_ad = torch.autograd.forward_ad
    forward_ad._current_level  # noqa: B018
    return (
        torch.is_grad_enabled,
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
        torch._C._functorch.peek_interpreter_stack,
        torch._C._get_tracing_state,
        torch._C._autograd._profiler_enabled,
        lambda: forward_ad._current_level >= 0,
    )


try:
    _watchers: tuple[Callable[[], Any], ...] | None = _probe()
except AttributeError:  # another version of PyTorch: always through the dispatcher
    _watchers = None


def unwatched(x: torch.Tensor, others: tuple[Any, ...]) -> bool:
    """Whether a call on ``x`` and ``others`` may leave the dispatcher out."""
    if _watchers is None or x.device != _CPU or torch.is_autocast_enabled("cpu"):
        return False
    for watcher in _watchers:
        if watcher():
            return False
    # Subclasses dispatch for themselves.
    if type(x) is not torch.Tensor:
        return False
    return all(type(o) in _PLAIN or not isinstance(o, torch.Tensor) for o in others)


_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None), str)


def caller(name: str) -> Callable[..., Any]:
    """``torch.ops.tilewright.<name>``, by the shorter way where that makes no difference; x is the first argument."""
    operator, kernel = getattr(getattr(torch.ops, NAMESPACE), name), kernel_of(name)

    def call(x: torch.Tensor, *rest: Any, **options: Any) -> Any:
        # Asked first: then nothing of what follows is compiled.
        if torch.compiler.is_compiling() or not unwatched(x, rest):
            return operator(x, *rest, **options)
        return kernel(x, *rest, **options)

    return call
