"""The quantisers and linear layers among the ``torch.library`` operators ``tilewright::*``.

Under autocast the activation and the residual are cast, scales are not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from tilewright.autotune.changes import when_changed
from tilewright.kernels import gradients, registry, tuning
from tilewright.kernels.checks import (
    check_devices,
    check_epilogue,
    check_input,
    check_int4_weight,
    check_int8_weight,
    check_sparse24_weight,
    check_vector,
)
from tilewright.kernels.dispatch.operator import Arguments, Operator, define
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.dispatch.router import invalidate, resolve, route, set_tuned_choices

Facts = Callable[[Arguments], dict[str, Any]]


def _serve(check: Callable[[str, Arguments], int], facts: Facts, op: str, arguments: Arguments) -> Callable[..., Any]:
    """Who serves a checked call. facts: fields of its ``Problem`` beyond the shape."""
    n = check(op, arguments)
    x = arguments["x"]
    shape = x.shape
    return resolve(op, math.prod(shape[:-1]), n, shape[-1], x.dtype, x.device, **facts(arguments))


def _prepare(
    check: Callable[[str, Arguments], int], facts: Facts, op: str, arguments: Arguments
) -> Callable[..., Any] | None:
    """The function of x and the residual that serves calls like this one, if its implementation has such a thing."""
    x = arguments["x"]
    n, k = check(op, arguments), x.shape[-1]
    problem = Problem(op, x.numel() // k, n, k, x.dtype, **facts(arguments), **device_facts(x.device))
    prepare = route(problem).implementation.prepared
    if prepare is None:
        return None
    given = {name: value for name, value in arguments.items() if name not in ("x", "residual")}
    # An int4 weight does not say how many of the nibbles in its last words are columns.
    return prepare(**given, **({"k": k} if "weight_packed" in given else {}))


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


def _check_sparse24_linear(op: str, arguments: Arguments) -> int:
    x = arguments["x"]
    check_input(op, x)
    check_devices(op, arguments)
    names = ("weight_values", "weight_meta", "weight_scale", "weight_zero", "group_size")
    n = check_sparse24_weight(op, x, *(arguments.get(name) for name in names))  # type: ignore[arg-type]
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
_SPARSE24 = "Tensor weight_values, Tensor weight_meta"
_END = "Tensor? bias=None, Tensor? residual=None"
_ACTIVATION = "str activation='none'"
_GRADIENTS = ("x", "bias", "residual")


def _operator(
    name: str,
    schema: str,
    check: Callable[[str, Arguments], int],
    facts: Facts,
    fake: Callable[[Arguments, int], Any],
    differentiable: tuple[str, ...] = (),
    prepared: bool = False,
) -> Operator:
    return Operator(
        name,
        schema,
        check,
        functools.partial(_serve, check, facts),
        fake,
        autocast=("x", "residual"),
        differentiable=differentiable,
        gradients=gradients.linear_gradients,
        prepare=functools.partial(_prepare, check, facts, name) if prepared else None,
    )


OPERATORS = {
    operator.name: operator
    for operator in (
        _operator(
            "quantize_per_row",
            "(Tensor x, Tensor? channel_scale=None) -> (Tensor, Tensor)",
            _check_quantizer,
            _no_facts,
            _fake_quantized,
        ),
        _operator(
            "rms_norm_quantize",
            "(Tensor x, Tensor? weight=None, float eps=1e-06) -> (Tensor, Tensor)",
            _check_quantizer,
            _no_facts,
            _fake_quantized,
        ),
        _operator(
            "layer_norm_quantize",
            "(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) -> (Tensor, Tensor)",
            _check_quantizer,
            _no_facts,
            _fake_quantized,
        ),
        _operator(
            "int8_linear",
            f"(Tensor x, {_INT8}, {_END}, {_ACTIVATION}, Tensor? channel_scale=None) -> Tensor",
            _check_int8_linear,
            _linear_facts,
            _fake_linear,
            _GRADIENTS,
            prepared=True,
        ),
        _operator(
            "int8_linear_quantized",
            f"(Tensor x, Tensor x_scale, {_INT8}, {_END}, {_ACTIVATION}, ScalarType? out_dtype=None) -> Tensor",
            _check_int8_linear,
            _linear_facts,
            _fake_linear,
            ("bias", "residual"),
        ),
        _operator(
            "int8_weight_only_linear",
            f"(Tensor x, {_INT8}, {_END}, {_ACTIVATION}, ScalarType? compute_dtype=None) -> Tensor",
            _check_int8_linear,
            _linear_facts,
            _fake_linear,
            _GRADIENTS,
        ),
        _operator(
            "int4_linear",
            f"(Tensor x, {_INT4}, {_END}, *, int group_size, {_ACTIVATION}, ScalarType? compute_dtype=None) -> Tensor",
            _check_int4_linear,
            _int4_facts,
            _fake_linear,
            _GRADIENTS,
        ),
        _operator(
            "int4_int8_linear",
            f"(Tensor x, {_INT4}, {_END}, Tensor? channel_scale=None, *, int group_size, {_ACTIVATION}) -> Tensor",
            _check_int4_linear,
            _int4_facts,
            _fake_linear,
            _GRADIENTS,
            prepared=True,
        ),
        _operator(
            "sparse24_linear",
            f"(Tensor x, {_SPARSE24}, {_END}, {_ACTIVATION}, ScalarType? compute_dtype=None) -> Tensor",
            _check_sparse24_linear,
            _linear_facts,
            _fake_linear,
            _GRADIENTS,
        ),
        _operator(
            "sparse24_int8_linear",
            f"(Tensor x, {_SPARSE24}, Tensor weight_scale, {_END}, {_ACTIVATION}, Tensor? channel_scale=None) "
            "-> Tensor",
            _check_sparse24_linear,
            _linear_facts,
            _fake_linear,
            _GRADIENTS,
        ),
        _operator(
            "sparse24_int4_linear",
            f"(Tensor x, {_SPARSE24}, Tensor weight_scale, Tensor? weight_zero=None, {_END}, *, int group_size, "
            f"{_ACTIVATION}, ScalarType? compute_dtype=None) -> Tensor",
            _check_sparse24_linear,
            _int4_facts,
            _fake_linear,
            _GRADIENTS,
        ),
    )
}


registry.register_all()
set_tuned_choices(tuning.preferred, tuning.tune_on_first_use)
when_changed(invalidate)
for _each in OPERATORS.values():
    define(_each)
    tuning.implementation_of(_each.name)
