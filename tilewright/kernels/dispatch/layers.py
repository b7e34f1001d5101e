"""Calls that come again with the same weights: straight to a C kernel whose other arguments were prepared before.

The dispatcher, the checks, the router and the look-up of packed weights take 9 us a call, as long as the product of a
small layer. In eager inference on CPU tensors none of it decides anything that the last call with an input of this
shape did not. A prepared call is taken where nobody looks at the operator (to differentiate it, cast its arguments,
trace, export, compile, batch or profile it), no tensor of the layer was replaced or written, and the router has not
changed its mind. Layers remember their own (``prepared_call``); for an operator that a compiled graph calls, where
there is no layer but the same tensors come each time, ``Repeats`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from tilewright.kernels.dispatch import repeated, router
from tilewright.kernels.dispatch.card import Card, card_of
from tilewright.kernels.dispatch.same import SameTensors, TensorCache, holds_values, version_of

Call = Callable[..., torch.Tensor]
_PLAIN = (torch.Tensor, torch.nn.Parameter)
#: Shapes of inputs that are remembered for each layer or weight, and weights of each operator.
_MOST_SHAPES = 64
_MOST_WEIGHTS = 4096
#: The attribute of a layer that holds what is known of its calls.
_SLOT = "_known_calls"
_forward_ad = torch.autograd.forward_ad


class Listener(TorchDispatchMode):
    """A mode of ours that lets every operator do what it does: implementations are chosen as without it."""


def _only_listeners() -> bool:
    """Whether every mode that sees the operators called now is a ``Listener``."""
    return all(isinstance(mode, Listener) for mode in _get_current_dispatch_mode_stack())


def _probe() -> tuple[Callable[[], Any], ...]:
    """What tells whether somebody looks: functions that return something false where nobody does. Raises AttributeError
    where this version of PyTorch lacks one.
    """
    _forward_ad._current_level  # noqa: B018
    return (
        torch.is_grad_enabled,
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
        torch._C._functorch.peek_interpreter_stack,
        torch._C._get_tracing_state,
        torch._C._autograd._profiler_enabled,
    )


try:
    _watchers: tuple[Callable[[], Any], ...] | None = _probe()
except AttributeError:  # another version of PyTorch: always through the dispatcher
    _watchers = None


def profiler_enabled() -> bool:
    """Whether PyTorch's profiler is on."""
    return bool(torch._C._autograd._profiler_enabled())


def can_bypass_dispatcher(x: torch.Tensor, *, profiler: bool = False, listeners: bool = False) -> bool:
    """Whether a call on ``x`` may leave the dispatcher out. profiler: the caller asks himself whether it is on.
    listeners: those of ours that listen need not hear of it.
    """
    if type(x) is not torch.Tensor or _watchers is None or not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return False
    grad, dispatch, function, transform, tracing, profiling = _watchers  # a loop takes twice as long
    return not (
        grad()
        or (dispatch() and not (listeners and _only_listeners()))
        or function()
        or transform()
        or tracing()
        or _forward_ad._current_level >= 0
        or (not profiler and profiling())
        or x.is_neg()  # as ``holds_values``, without a call
        or x._is_zerotensor()
    )


def _leave_traces(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether a kernel may read the memory of ``tensors`` and a change of it can be seen: writes into inference tensors
    cannot, and subclasses dispatch for themselves.
    """
    return all(
        t is None or (type(t) in _PLAIN and t.is_cpu and version_of(t) >= 0 and holds_values(t)) for t in tensors
    )


def _find(calls: dict[Any, Call | None], key: Any, prepare: Callable[[], Call | None]) -> Call | None:
    """The call of ``key``, prepared when it comes the second time: the first goes to the operator, which checks all."""
    if key not in calls:
        if len(calls) >= _MOST_SHAPES:
            calls.clear()
        calls[key] = None
        return None
    calls[key] = call = prepare()
    return call


def prepare(card: Card, arguments: Mapping[str, Any]) -> Call | None:
    """The function of x and the residual that serves calls like this one, if its implementation has such a thing.

    Raises for arguments that the operator would refuse: what is prepared checks nothing.
    """
    problem = card.problem(card.name, arguments, card.check(card.name, arguments))
    make = router.route_call(problem).implementation.prepared
    if make is None:
        return None
    given, x = {name: value for name, value in arguments.items() if name not in ("x", "residual")}, arguments["x"]
    made: Call = make(**given, k=x.shape[-1])
    for_rows = getattr(made, "for_rows", None)  # calls of one shape may be prepared further
    return made if for_rows is None else for_rows(x.shape, x.dtype)


class Layer(Protocol):
    """What ``prepared_call`` asks of a layer."""

    activation: str
    op_name: ClassVar[str]
    _held_names: ClassVar[tuple[str, ...]]

    def _check_input(self, x: torch.Tensor) -> None: ...

    def _arguments(self) -> dict[str, Any]: ...


class _Known:
    """What is known of one layer's calls, for as long as its tensors are the same and the router decides as it did."""

    __slots__ = ("again", "calls", "generation", "repeated", "same")

    def __init__(self, tensors: Sequence[torch.Tensor | None]):
        self.generation = router.generation()
        self.calls: dict[Any, Call | None] = {}
        #: What was remembered for ``again``, a function of the layer's attributes and x, by the shape of x.
        self.repeated: dict[torch.Size, object] = {}
        self.again: Callable[..., torch.Tensor | None] | None = None
        self.same = SameTensors(tensors, self._clear)

    def _clear(self) -> None:
        self.calls.clear()
        self.repeated.clear()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of the layer knows nothing, and a file holds nothing of this


def invalidate(layer: torch.nn.Module) -> None:
    """Drop what is known of ``layer``."""
    vars(layer).pop(_SLOT, None)


def _remember(known: _Known, layer: Layer, x: torch.Tensor, tensors: Sequence[torch.Tensor | None], call: Call) -> None:
    """Have calls like this one, which ``call`` serves, find it by the shortest way."""
    if not x.is_contiguous() or repeated.why_not(_SLOT):
        return
    if len(known.repeated) >= _MOST_SHAPES:
        known.repeated.clear()
    held = repeated.Held(layer._held_names, tensors, known.same, layer.activation, known.generation)
    known.again, known.repeated[x.shape] = repeated.remember(held, x, call)


def repeated_call(attributes: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor | None:
    """The result for ``x`` of the layer that has these attributes, if a call like it was prepared before, or None: then
    ``prepared_call`` is to be asked.
    """
    known = attributes.get(_SLOT)
    return None if known is None or known.again is None else known.again(attributes, x)


def prepared_call(layer: Layer, x: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> Call | None:
    """The function of ``x`` alone that serves this call of ``layer``, or None: then the operator is to be called.

    tensors: all that the layer's operator reads beside x. The first call with an input of some shape always goes to the
    operator.
    """
    if not can_bypass_dispatcher(x):
        return None
    slots = layer.__dict__
    known = slots.get(_SLOT)
    if known is None or known.generation != router.generation() or not known.same.match(tensors):
        if not _leave_traces(tensors):
            return None
        known = slots[_SLOT] = _Known(tensors)
    call: Call | None = known.calls.get((x.shape, x.dtype, layer.activation))
    if call is not None:
        _remember(known, layer, x, tensors, call)
        return call
    layer._check_input(x)
    card = card_of(layer.op_name)
    if card is None or not x.numel():
        return None
    return _find(
        known.calls,
        (x.shape, x.dtype, layer.activation),
        lambda: prepare(card, {"x": x, "residual": None, **layer._arguments()}),
    )


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
        self._known: TensorCache[dict[Any, Call | None]] = TensorCache(_MOST_WEIGHTS)
        router.on_invalidate(self._known.clear)

    def find(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> Call | None:
        """The function of x and the residual that serves the call, or None: then the operator is to be called.

        The first call with an x of some shape always goes to the operator, which checks everything.
        """
        x, weight = args[0], args[1]
        others = (*args[1 : self.residual], *args[self.residual + 1 :])
        residual = args[self.residual] if len(args) > self.residual else None
        tensors = [each if isinstance(each, torch.Tensor) else None for each in others]
        key = (
            x.shape,
            x.dtype,
            None if residual is None else (residual.shape, residual.dtype),
            *[each for each in others if not isinstance(each, torch.Tensor)],
            *named.items(),
        )
        calls = self._known.get(id(weight), tensors)
        if calls is None:
            if not _leave_traces(tensors):
                return None
            calls = self._known.make(id(weight), tensors, dict)
        call = calls.get(key)
        if call is not None:
            return call
        return _find(calls, key, lambda: self.prepare(self.bind(args, named)) if x.numel() else None)
