"""The ``torch.library`` operators ``tilewright::*``: the only place that registers any.

Each operator has one kernel for every device, which checks its arguments and asks the router who serves the call; a
fake kernel; an autograd formula; and an autocast rule: the activation and the residual are cast, scales are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tilewright.kernels import gradients, registry
from tilewright.kernels.checks import (
    check_devices,
    check_epilogue,
    check_input,
    check_int4_weight,
    check_int8_weight,
    check_vector,
)
from tilewright.kernels.router import serve

NAMESPACE = "tilewright"
Arguments = Mapping[str, Any]
Binder = Callable[[tuple[Any, ...], Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Operator:
    """name, schema without the name; check: raises for bad arguments and returns N; facts: fields of the ``Problem``
    beyond the shape; fake: the outputs' shapes and dtypes; differentiable: arguments with a gradient.
    """

    name: str
    schema: str
    check: Callable[[str, Arguments], int]
    facts: Callable[[Arguments], dict[str, Any]]
    fake: Callable[[Arguments, int], Any]
    differentiable: tuple[str, ...] = ()


# ---- quantisers
def _check_quantizer(op: str, arguments: Arguments) -> int:
    check_input(op, arguments["x"])
    check_devices(op, arguments)
    k = arguments["x"].shape[-1]
    for name in ("weight", "bias", "channel_scale"):
        check_vector(op, name, arguments.get(name), k)
    return k


def _fake_quantized(arguments: Arguments, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = arguments["x"]
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _no_facts(arguments: Arguments) -> dict[str, Any]:
    return {}


# ---- linear
def _check_int8_linear(op: str, arguments: Arguments) -> int:
    x = arguments["x"]
    check_input(op, x, torch.int8 if "x_scale" in arguments else None)
    check_devices(op, arguments)
    n = check_int8_weight(op, x, arguments["weight"], arguments["weight_scale"])
    check_epilogue(op, x, n, arguments["bias"], arguments["residual"], arguments["activation"])
    check_vector(op, "channel_scale", arguments.get("channel_scale"), x.shape[-1])
    if "x_scale" not in arguments:
        return n
    if arguments["x_scale"].dtype != torch.float32:
        raise TypeError(f"{op}: x_scale must be float32, not {arguments['x_scale'].dtype}")
    if arguments["x_scale"].shape != x.shape[:-1]:
        raise ValueError(f"{op}: x_scale must have shape {list(x.shape[:-1])}, not {list(arguments['x_scale'].shape)}")
    return n


def _check_int4_linear(op: str, arguments: Arguments) -> int:
    x = arguments["x"]
    check_input(op, x)
    check_devices(op, arguments)
    weight = (arguments["weight_packed"], arguments["weight_scale"], arguments["weight_zero"])
    n = check_int4_weight(op, x, *weight, arguments["group_size"])
    check_epilogue(op, x, n, arguments["bias"], arguments["residual"], arguments["activation"])
    check_vector(op, "channel_scale", arguments.get("channel_scale"), x.shape[-1])
    return n


def _linear_facts(arguments: Arguments) -> dict[str, Any]:
    return {
        "activation": arguments["activation"],
        "bias": arguments["bias"] is not None,
        "residual": arguments["residual"] is not None,
        "compute_dtype": arguments.get("compute_dtype"),
    }


def _int4_facts(arguments: Arguments) -> dict[str, Any]:
    return {
        **_linear_facts(arguments),
        "group_size": arguments["group_size"],
        "symmetric": arguments["weight_zero"] is None,
        "scale_dtype": arguments["weight_scale"].dtype,
    }


def _fake_linear(arguments: Arguments, n: int) -> torch.Tensor:
    x = arguments["x"]
    dtype = (arguments["out_dtype"] or torch.float32) if "out_dtype" in arguments else x.dtype
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


_INT8 = "Tensor weight, Tensor weight_scale"
_INT4 = "Tensor weight_packed, Tensor weight_scale, Tensor? weight_zero=None"
_END = "Tensor? bias=None, Tensor? residual=None"
_ACTIVATION = "str activation='none'"
_GRADIENTS = ("x", "bias", "residual")
OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            "quantize_per_row",
            "(Tensor x, Tensor? channel_scale=None) -> (Tensor, Tensor)",
            _check_quantizer,
            _no_facts,
            _fake_quantized,
        ),
        Operator(
            "rms_norm_quantize",
            "(Tensor x, Tensor? weight=None, float eps=1e-06) -> (Tensor, Tensor)",
            _check_quantizer,
            _no_facts,
            _fake_quantized,
        ),
        Operator(
            "layer_norm_quantize",
            "(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) -> (Tensor, Tensor)",
            _check_quantizer,
            _no_facts,
            _fake_quantized,
        ),
        Operator(
            "int8_linear",
            f"(Tensor x, {_INT8}, {_END}, {_ACTIVATION}, Tensor? channel_scale=None) -> Tensor",
            _check_int8_linear,
            _linear_facts,
            _fake_linear,
            _GRADIENTS,
        ),
        Operator(
            "int8_linear_quantized",
            f"(Tensor x, Tensor x_scale, {_INT8}, {_END}, {_ACTIVATION}, ScalarType? out_dtype=None) -> Tensor",
            _check_int8_linear,
            _linear_facts,
            _fake_linear,
        ),
        Operator(
            "int8_weight_only_linear",
            f"(Tensor x, {_INT8}, {_END}, {_ACTIVATION}, ScalarType? compute_dtype=None) -> Tensor",
            _check_int8_linear,
            _linear_facts,
            _fake_linear,
            _GRADIENTS,
        ),
        Operator(
            "int4_linear",
            f"(Tensor x, {_INT4}, {_END}, *, int group_size, {_ACTIVATION}, ScalarType? compute_dtype=None) -> Tensor",
            _check_int4_linear,
            _int4_facts,
            _fake_linear,
            _GRADIENTS,
        ),
        Operator(
            "int4_int8_linear",
            f"(Tensor x, {_INT4}, {_END}, Tensor? channel_scale=None, *, int group_size, {_ACTIVATION}) -> Tensor",
            _check_int4_linear,
            _int4_facts,
            _fake_linear,
            _GRADIENTS,
        ),
    )
}


# ---- registration
def _define(operator: Operator, library: torch.library.Library) -> None:
    name = operator.name
    library.define(name + operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    declared = overload._schema.arguments
    positional = tuple(argument.name for argument in declared if not argument.kwarg_only)
    defaults = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}

    def bind(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**defaults, **dict(zip(positional, args, strict=False)), **kwargs}

    def kernel(*args: Any, **kwargs: Any) -> Any:
        arguments = bind(args, kwargs)
        n = operator.check(name, arguments)
        x = arguments["x"]
        shape = x.shape
        function = serve(name, math.prod(shape[:-1]), n, shape[-1], x.dtype, x.device, **operator.facts(arguments))
        return function(**arguments)

    def fake(*args: Any, **kwargs: Any) -> Any:
        arguments = bind(args, kwargs)
        return operator.fake(arguments, operator.check(name, arguments))

    for device in ("CPU", "CUDA"):
        library.impl(name, kernel, device)
        library.impl(name, _autocast(overload, bind, device.lower()), "Autocast" + device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    _register_autograd(operator, overload, positional, bind, library)


def _autocast(overload: Any, bind: Binder, device: str) -> Callable[..., Any]:
    """Casts x and residual to the autocast dtype where they are float; everything else stays as it is."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, "Autocast" + device.upper()))

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = bind(args, kwargs)
        dtype = torch.get_autocast_dtype(device)
        for name in ("x", "residual"):
            value = arguments.get(name)
            # As for PyTorch's own operators, float64 is left alone.
            if value is not None and value.is_floating_point() and value.dtype != torch.float64:
                arguments[name] = value.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return overload(**arguments)

    return run


def _register_autograd(
    operator: Operator, overload: Any, positional: tuple[str, ...], bind: Binder, library: torch.library.Library
) -> None:
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: Mapping[str, Any] | None = None
    ) -> None:
        arguments = bind(inputs, keyword_only_inputs or {})
        ctx.tensor_names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
        ctx.others = {name: value for name, value in arguments.items() if not isinstance(value, torch.Tensor)}
        ctx.save_for_backward(*(arguments[name] for name in ctx.tensor_names))

    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not operator.differentiable:
            raise RuntimeError(f"{NAMESPACE}::{operator.name} is for inference: it has no gradient")
        arguments = {**ctx.others, **dict(zip(ctx.tensor_names, ctx.saved_tensors, strict=True))}
        wanted = frozenset(
            name
            for name, needed in zip(positional, ctx.needs_input_grad, strict=False)
            if needed and name in operator.differentiable
        )
        found = gradients.linear_gradients(grads[0], arguments, wanted)
        return tuple(found.get(name) for name in positional)

    torch.library.register_autograd(overload, backward, setup_context=setup_context, lib=library)


registry.register_all()
_library = torch.library.Library(NAMESPACE, "DEF")
for _operator in OPERATORS.values():
    _define(_operator, _library)
