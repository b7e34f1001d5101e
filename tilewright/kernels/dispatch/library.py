"""How the operator of a card is registered with ``torch.library``: the only place that does.

Each operator has one kernel for every device, which checks its arguments and asks the router who serves the call; a
fake kernel; derivatives; a rule for ``torch.vmap``; and, where it has one, an autocast rule. Calls that repeat on a CPU
take a short cut, before anything of autograd where no gradient is asked for (``Repeats``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from tilewright.kernels.dispatch.card import Card, add
from tilewright.kernels.dispatch.derivatives import (
    batched,
    detached,
    has_tangent,
    is_tracked,
    is_transformed,
    joined,
)
from tilewright.kernels.dispatch.layers import Repeats, can_bypass_dispatcher, prepare
from tilewright.kernels.dispatch.router import on_invalidate, register, route_call
from tilewright.kernels.dispatch.same import holds_values

NAMESPACE = "tilewright"
#: Calls of one operator, by shapes and dtypes, whose implementation is remembered.
_REMEMBERED = 4096
Binder = Callable[[tuple[Any, ...], Mapping[str, Any]], dict[str, Any]]


def define(card: Card) -> None:
    """Register the operator of ``card`` for CPU and CUDA tensors, and its implementations with the router.

    Raises ValueError for a name that is taken.
    """
    add(card)
    for way in card.implementations:
        register(way.of(card))
    name = card.name
    _library.define(name + card.schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    declared = overload._schema.arguments
    positional = tuple(argument.name for argument in declared if not argument.kwarg_only)
    defaults = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}

    def bind(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**defaults, **dict(zip(positional, args, strict=False)), **kwargs}

    dispatched: dict[tuple[Any, ...], Callable[..., Any]] = {}
    on_invalidate(dispatched.clear)
    residual = positional.index("residual") if "residual" in positional else len(positional)
    repeats = Repeats(residual, functools.partial(prepare, card), bind) if card.remembered else None

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if repeats is not None and args[0].is_cpu and (call := repeats.find(args, kwargs)) is not None:
            return call(args[0], args[residual] if len(args) > residual else None)
        arguments = bind(args, kwargs)
        # Checking and routing look at nothing but what is in the key: they cost more than a small product.
        key = (*map(_signature, args), *[(name, _signature(value)) for name, value in kwargs.items()])
        function = dispatched.get(key)
        if function is None:
            problem = card.problem(name, arguments, card.check(name, arguments))
            function = route_call(problem).implementation.function
            if len(dispatched) >= _REMEMBERED:
                dispatched.clear()
            dispatched[key] = function
        return function(**arguments)

    def fake(*args: Any, **kwargs: Any) -> Any:
        arguments = bind(args, kwargs)
        return card.fake(arguments, card.check(name, arguments))

    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
        if card.autocast:
            cast = _autocast(overload, bind, device.lower(), card.autocast)
            _library.impl(name, cast, "Autocast" + device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _register_vmap(card, overload, positional, bind)
    general = _register_autograd(card, overload, positional, bind)
    _library.impl(name, general, "AutogradCUDA", with_keyset=True)
    if repeats is None:
        _library.impl(name, general, "AutogradCPU", with_keyset=True)
        return

    def before_autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        # In compiled graphs the way through autograd costs as much as a small product. Modes and subclasses want to see
        # the operator, though, and everything below this kernel.
        if can_bypass_dispatcher(args[0]):
            given = args[residual] if len(args) > residual else None
            if given is None or (type(given) is torch.Tensor and holds_values(given)):
                call = repeats.find(args, kwargs)
                if call is not None:
                    return call(args[0], given)
        return general(keyset, *args, **kwargs)

    _library.impl(name, before_autograd, "AutogradCPU", with_keyset=True)


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    return [each for each in values if isinstance(each, torch.Tensor)]


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device
    return tuple(value) if isinstance(value, list) else value


def _autocast(overload: Any, bind: Binder, device: str, names: tuple[str, ...]) -> Callable[..., Any]:
    """Casts the arguments called ``names`` to the autocast dtype where they are float; all else stays as it is."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, "Autocast" + device.upper()))

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = bind(args, kwargs)
        dtype = torch.get_autocast_dtype(device)
        for name in names:
            value = arguments.get(name)
            # As for PyTorch's own operators, float64 is left alone.
            if value is not None and value.is_floating_point() and value.dtype != torch.float64:
                arguments[name] = value.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return overload(**arguments)

    return run


def _register_vmap(card: Card, overload: Any, positional: tuple[str, ...], bind: Binder) -> None:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        given = dict(zip(positional, in_dims, strict=False))
        dims = {name: dim for name, dim in given.items() if isinstance(dim, int)}
        return batched(lambda **named: overload(**named), card.fold, bind(args, kwargs), dims, info.batch_size)

    torch.library.register_vmap(f"{NAMESPACE}::{card.name}", rule, lib=_library)


def _register_autograd(card: Card, overload: Any, positional: tuple[str, ...], bind: Binder) -> Callable[..., Any]:
    """Returns the kernel for autograd's keys: hand-written gradients in an ordinary backward pass, else ``joined``."""

    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: Mapping[str, Any] | None = None
    ) -> None:
        arguments = bind(inputs, keyword_only_inputs or {})
        ctx.tensor_names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
        ctx.others = {name: value for name, value in arguments.items() if not isinstance(value, torch.Tensor)}
        ctx.save_for_backward(*(arguments[name] for name in ctx.tensor_names))

    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if card.gradients is None or not card.differentiable:
            raise RuntimeError(f"{NAMESPACE}::{card.name} is for inference: it has no gradient")
        arguments = {**ctx.others, **dict(zip(ctx.tensor_names, ctx.saved_tensors, strict=True))}
        required = frozenset(
            name
            for name, needed in zip(positional, ctx.needs_input_grad, strict=False)
            if needed and name in card.differentiable
        )
        found = card.gradients(grads[0], arguments, required)
        return tuple(found.get(name) for name in positional)

    def below(keyset: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    def straight_through(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = bind(args, kwargs)
        if not is_tracked(_tensors(arguments.values())):
            return below(keyset, args, kwargs)
        if card.smooth is None:
            raise RuntimeError(f"{NAMESPACE}::{card.name} is for inference: it has no derivative")
        constant = {
            name: value if name in card.differentiable else detached(value) for name, value in arguments.items()
        }
        return joined(below(keyset, detached(args), kwargs), card.smooth(constant))

    torch.library.register_autograd(overload, backward, setup_context=setup_context, lib=_library)
    if card.gradients is None:
        return straight_through
    try:
        from torch._library.autograd import Info, make_autograd_impl
    except ImportError:  # as right, and slower
        return straight_through
    general = make_autograd_impl(overload, Info(backward, setup_context))

    def differentiable(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if is_transformed() or has_tangent(_tensors(args)):
            return straight_through(keyset, *args, **kwargs)
        return general(keyset, *args, **kwargs)

    return differentiable


_library = torch.library.Library(NAMESPACE, "DEF")
