"""The convolutions among the ``torch.library`` operators ``tilewright::*``.

Under autocast the float convolution casts x, residual and weight, as PyTorch's own does, and leaves the bias; the
quantised operators take what they are given. The float convolution has gradients for x, weight, bias and residual; the
quantised ones are for inference, and say so if a gradient is asked of them.

In a small network the cost is overhead per call, so what is known of a call from shapes, dtypes and numbers alone, that
its arguments are right and who serves it, is worked out once and remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tilewright.kernels import registry
from tilewright.kernels.activation import CONV_ACTIVATIONS, check_activation
from tilewright.kernels.checks import SCALE_DTYPES, check_devices, check_input, check_vector
from tilewright.kernels.conv2d.gradients import conv_gradients
from tilewright.kernels.conv_geometry import ConvGeometry, check_geometry, empty_channels_last
from tilewright.kernels.dispatch.operator import Arguments, Operator, define
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.dispatch.router import on_invalidate, route_call
from tilewright.kernels.formats import sparse24
from tilewright.kernels.sparse24_conv2d.reference import unpack_weight
from tilewright.kernels.tuning import implementation_of

INTEGERS = (torch.int8, torch.uint8)
_REMEMBERED = 8192


# ---- checks
def _check_number(op: str, name: str, value: float | None) -> None:
    """``value``, if given, is a scale: positive and finite."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{op}: {name} must be positive and finite, not {value}")


def _check_window(op: str, arguments: Arguments) -> ConvGeometry:
    """What both convolutions demand alike."""
    x, bias, residual = arguments["x"], arguments["bias"], arguments["residual"]
    window = (arguments[name] for name in ("stride", "padding", "dilation", "groups"))
    geometry = check_geometry(op, x, arguments["weight"], *window)
    check_devices(op, arguments)
    check_activation(arguments["activation"], CONV_ACTIVATIONS)
    check_vector(op, "bias", bias, geometry.out_channels)
    if residual is not None:
        shape = list(geometry.out_shape)
        if residual.dim() != 4 or any(a != b for a, b in zip(residual.shape, shape, strict=True)):
            raise ValueError(f"{op}: residual must have the shape of the result, {shape}, not {list(residual.shape)}")
    return geometry


def _check_conv(op: str, arguments: Arguments) -> ConvGeometry:
    x, weight, bias, residual = (arguments[name] for name in ("x", "weight", "bias", "residual"))
    check_input(op, x)
    if weight.dtype != x.dtype:
        raise TypeError(f"{op}: weight must have the dtype of x, {x.dtype}, not {weight.dtype}")
    geometry = _check_window(op, arguments)
    if bias is not None and bias.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"{op}: bias must be float32 or have the dtype of x, {x.dtype}, not {bias.dtype}")
    if residual is not None and not residual.is_floating_point():
        raise TypeError(f"{op}: residual must be a float tensor, not {residual.dtype}")
    return geometry


def _check_sparse24_conv(op: str, arguments: Arguments) -> ConvGeometry:
    return _check_conv(op, _with_dense_shape(op, arguments))


def _with_dense_shape(op: str, arguments: Arguments) -> dict[str, Any]:
    """The arguments with a ``weight`` of the shape that the 2:4 one stands for, and no memory."""
    x, values, meta = arguments["x"], arguments["weight_values"], arguments["weight_meta"]
    check_input(op, x)
    kernel_size, groups = list(arguments["kernel_size"]), arguments["groups"]
    if x.dim() != 4 or len(kernel_size) != 2 or min(kernel_size) < 1 or groups < 1 or x.shape[1] % groups:
        raise ValueError(
            f"{op}: x must be [N, C, H, W] with C a multiple of groups={groups} and kernel_size two positive integers, "
            f"not {list(x.shape)} and {kernel_size}"
        )
    for name, value in (("weight_values", values), ("weight_meta", meta)):
        if value.dim() != 2:
            raise ValueError(f"{op}: {name} must be a matrix, not of shape {list(value.shape)}")
    if not values.is_floating_point():
        raise TypeError(f"{op}: weight_values must be a float tensor, not {values.dtype}")
    if meta.dtype != torch.uint8:
        raise TypeError(f"{op}: weight_meta must be uint8, not {meta.dtype}")
    channels, window = x.shape[1] // groups, kernel_size[0] * kernel_size[1]
    rows, required = values.shape[0], (sparse24.kept_count(channels), sparse24.meta_count(channels))
    if rows % window or meta.shape[0] != rows or (values.shape[1], meta.shape[1]) != required:
        raise ValueError(
            f"{op}: for {channels} channels and a window of {kernel_size}, weight_values and weight_meta must have "
            f"{required[0]} and {required[1]} columns and a multiple of {window} rows, "
            f"not shapes {list(values.shape)} and {list(meta.shape)}"
        )
    return {**arguments, "weight": x.new_empty(()).expand(rows // window, *kernel_size, channels)}


def _check_int8_conv(op: str, arguments: Arguments) -> ConvGeometry:
    x, weight, residual = (arguments[name] for name in ("x", "weight", "residual"))
    if x.dtype not in INTEGERS:
        raise TypeError(f"{op}: x must be int8 or uint8, not {x.dtype}")
    if weight.dtype != torch.int8:
        raise TypeError(f"{op}: weight must be int8, not {weight.dtype}")
    geometry = _check_window(op, arguments)
    if arguments["weight_scale"].dtype != torch.float32:
        raise TypeError(f"{op}: weight_scale must be float32, not {arguments['weight_scale'].dtype}")
    check_vector(op, "weight_scale", arguments["weight_scale"], geometry.out_channels)
    if residual is not None and residual.dtype not in (*INTEGERS, *SCALE_DTYPES):
        raise TypeError(f"{op}: residual must be int8, uint8, float16, bfloat16 or float32, not {residual.dtype}")
    for name in ("x_scale", "residual_scale", "out_scale"):
        _check_number(op, name, arguments[name])
    _int8_out_dtype(op, arguments)
    return geometry


def _int8_out_dtype(op: str, arguments: Arguments) -> torch.dtype:
    """What the int8 convolution returns."""
    dtype = arguments["out_dtype"]
    quantized = arguments["out_scale"] is not None
    allowed = INTEGERS if quantized else SCALE_DTYPES
    if dtype is None:
        return torch.int8 if quantized else torch.float32
    if dtype not in allowed:
        names = ", ".join(str(each).removeprefix("torch.") for each in allowed)
        raise TypeError(
            f"{op}: out_dtype must be one of {names} {'with' if quantized else 'without'} out_scale: {dtype}"
        )
    return dtype


def _check_quantize(op: str, arguments: Arguments) -> torch.dtype:
    check_input(op, arguments["x"])
    _check_number(op, "scale", arguments["scale"])
    dtype = arguments["out_dtype"] or torch.int8
    if dtype not in INTEGERS:
        raise TypeError(f"{op}: out_dtype must be int8 or uint8, not {dtype}")
    return dtype


# ---- problems
def _conv_problem(op: str, arguments: Arguments) -> Problem:
    quantized = "x_scale" in arguments
    geometry = (_check_int8_conv if quantized else _check_conv)(op, arguments)
    x, residual = arguments["x"], arguments["residual"]
    return Problem(
        op,
        m=geometry.batch * geometry.out_height * geometry.out_width,
        n=geometry.out_channels,
        k=geometry.taps * geometry.group_channels,
        x_dtype=x.dtype,
        activation=arguments["activation"],
        bias=arguments["bias"] is not None,
        residual=residual is not None,
        conv=geometry,
        out_dtype=_int8_out_dtype(op, arguments) if quantized else x.dtype,
        residual_dtype=None if residual is None else residual.dtype,
        allow_tf32=arguments.get("allow_tf32", False),
        **device_facts(x.device),
    )


def _quantize_problem(op: str, arguments: Arguments) -> Problem:
    x, dtype = arguments["x"], _check_quantize(op, arguments)
    k = x.shape[-1] if x.dim() else 1
    return Problem(op, x.numel() // max(k, 1), 0, k, x.dtype, out_dtype=dtype, **device_facts(x.device))


def _sparse24_problem(op: str, arguments: Arguments) -> Problem:
    return _conv_problem(op, _with_dense_shape(op, arguments))


def _sparse24_gradients(
    grad: torch.Tensor, arguments: Arguments, required: frozenset[str]
) -> Mapping[str, torch.Tensor | None]:
    names = ("x", "weight_values", "weight_meta", "kernel_size", "groups")
    return conv_gradients(grad, {**arguments, "weight": unpack_weight(*(arguments[name] for name in names))}, required)


# ---- fake results
def _fake_conv(arguments: Arguments, geometry: ConvGeometry) -> torch.Tensor:
    return empty_channels_last(geometry.out_shape, arguments["x"].dtype, arguments["x"].device)


def _fake_int8_conv(arguments: Arguments, geometry: ConvGeometry) -> torch.Tensor:
    dtype = _int8_out_dtype("int8_conv2d_fused", arguments)
    return empty_channels_last(geometry.out_shape, dtype, arguments["x"].device)


def _fake_quantize(arguments: Arguments, dtype: torch.dtype) -> torch.Tensor:
    x = arguments["x"]
    if x.dim() == 4:
        return empty_channels_last(x.shape, dtype, x.device)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


# ---- who serves a call
_dispatched: dict[tuple[Any, ...], Callable[..., Any]] = {}
on_invalidate(_dispatched.clear)


def _remembering(problem: Callable[[str, Arguments], Problem]) -> Callable[[str, Arguments], Callable[..., Any]]:
    """``Operator.implementation`` by ``problem``, which checks the arguments: once for all calls that look alike."""

    def implementation(op: str, arguments: Arguments) -> Callable[..., Any]:
        key = (op, *[_signature(arguments[name]) for name in sorted(arguments)])
        function = _dispatched.get(key)
        if function is None:
            function = route_call(problem(op, arguments)).implementation.function
            if len(_dispatched) >= _REMEMBERED:
                _dispatched.clear()
            _dispatched[key] = function
        return function

    return implementation


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device
    return tuple(value) if isinstance(value, list) else value


_WINDOW = "int[2] stride=1, int[4] padding=0, int[2] dilation=1, int groups=1"
_ACTIVATION = "str activation='none', float negative_slope=0.01"
CONV_OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            "conv2d_fused",
            f"(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, {_WINDOW}, {_ACTIVATION}, "
            "bool allow_tf32=False) -> Tensor",
            _check_conv,
            _remembering(_conv_problem),
            _fake_conv,
            autocast=("x", "weight", "residual"),
            differentiable=("x", "weight", "bias", "residual"),
            gradients=conv_gradients,
        ),
        Operator(
            "sparse24_conv2d_fused",
            "(Tensor x, Tensor weight_values, Tensor weight_meta, Tensor? bias=None, Tensor? residual=None, "
            f"int[2] kernel_size=1, {_WINDOW}, {_ACTIVATION}, bool allow_tf32=False) -> Tensor",
            _check_sparse24_conv,
            _remembering(_sparse24_problem),
            _fake_conv,
            autocast=("x", "residual"),
            differentiable=("x", "bias", "residual"),
            gradients=_sparse24_gradients,
        ),
        Operator(
            "quantize_per_tensor",
            "(Tensor x, float scale, ScalarType? out_dtype=None) -> Tensor",
            _check_quantize,
            _remembering(_quantize_problem),
            _fake_quantize,
        ),
        Operator(
            "int8_conv2d_fused",
            "(Tensor x, float x_scale, Tensor weight, Tensor weight_scale, Tensor? bias=None, Tensor? residual=None, "
            f"float residual_scale=1.0, {_WINDOW}, {_ACTIVATION}, float? out_scale=None, "
            "ScalarType? out_dtype=None, bool x_nonnegative=False) -> Tensor",
            _check_int8_conv,
            _remembering(_conv_problem),
            _fake_int8_conv,
        ),
    )
}


registry.register_convolutions()
for _each in CONV_OPERATORS.values():
    define(_each)
    implementation_of(_each.name)
