"""Short cuts for calls that a layer repeats: straight to a C kernel whose other arguments were prepared before.

The dispatcher, the checks, the router and the look-up of packed weights take 9 us a call, as long as the product of a
small layer. In eager inference on CPU tensors none of it decides anything that the last call with an input of this
shape did not. A short cut is taken where nobody looks at the operator (to differentiate it, cast its arguments, trace,
export, compile, batch or profile it), no tensor of the layer was replaced or written, and the router has not changed
its mind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.problem import Problem

Call = Callable[[torch.Tensor], torch.Tensor]
_CPU = torch.device("cpu")
#: Shapes of inputs that are remembered for each layer.
_REMEMBERED = 64


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
        lambda: forward_ad._current_level >= 0,
        torch._C._autograd._profiler_enabled,  # the last one: see ``can_bypass_dispatcher``
    )


try:
    _watchers: tuple[Callable[[], Any], ...] | None = _probe()
except AttributeError:  # another version of PyTorch: always through the dispatcher
    _watchers = None


def profiler_enabled() -> bool:
    """Whether PyTorch's profiler is on."""
    return bool(torch._C._autograd._profiler_enabled())


def can_bypass_dispatcher(x: torch.Tensor, *, profiler: bool = False) -> bool:
    """Whether a call on ``x`` may leave the dispatcher out. profiler: the caller asks himself whether it is on."""
    if type(x) is not torch.Tensor or _watchers is None or x.device != _CPU or torch.is_autocast_enabled("cpu"):
        return False
    for watcher in _watchers[:-1] if profiler else _watchers:  # noqa: SIM110  (a generator takes twice as long)
        if watcher():
            return False
    return True


class _Known:
    """What is known of one layer's calls, for as long as its tensors are these and unwritten."""

    def __init__(self, tensors: Sequence[torch.Tensor | None]):
        self.generation = router.generation()
        self.tensors = [(None, 0) if t is None else (weakref.ref(t), t._version) for t in tensors]
        self.calls: dict[Any, Call | None] = {}

    def holds(self, tensors: Sequence[torch.Tensor | None]) -> bool:
        if self.generation != router.generation():
            return False
        for tensor, (ref, version) in zip(tensors, self.tensors, strict=True):
            if ref is None or tensor is None:
                if (ref is None) != (tensor is None):
                    return False
            elif ref() is not tensor or tensor._version != version:
                return False
        return True


_layers: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


def invalidate(layer: Any) -> None:
    """Drop what is known of ``layer``."""
    _layers.pop(layer, None)


def prepared_call(
    layer: Any,
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    activation: str,
    problem: Callable[[int, torch.dtype], Problem],
    arguments: Callable[[], dict[str, Any]],
) -> Call | None:
    """The function of ``x`` alone that serves this call of ``layer``, or None: then the operator is to be called.

    tensors: all that the layer's operator reads beside x. activation: the layer's. problem: of (rows, dtype of x).
    arguments: of the operator, without x. The first call with an input of some shape always goes to the operator, which
    checks everything.
    """
    if not can_bypass_dispatcher(x):
        return None
    known, key = _layers.get(layer), (x.shape, x.dtype, activation)
    if known is None or not known.holds(tensors):
        # Writes into inference tensors leave no trace, and subclasses dispatch for themselves.
        if any(t is not None and (type(t) not in _PLAIN or t.is_inference() or t.device != _CPU) for t in tensors):
            return None
        known = _layers[layer] = _Known(tensors)
    if key in known.calls:
        call = known.calls[key]
        if call is not None:
            return call
        decision = router.route(problem(x.numel() // x.shape[-1], x.dtype)) if x.numel() else None
        prepare = None if decision is None else decision.implementation.prepared
        if prepare is not None:
            known.calls[key] = prepare(**arguments())
        return known.calls[key]
    if len(known.calls) >= _REMEMBERED:
        known.calls.clear()
    known.calls[key] = None
    return None


_PLAIN = (torch.Tensor, torch.nn.Parameter)
