"""What the cards of linear operators share: y = activation(x W^T + b) + r for a weight of some format.

Under autocast the activation and the residual are cast, scales are not. Gradients reach x, bias and residual, so that
adapters train on a quantised base. Weights are constants. With z = x W^T + b and y = act(z) + r, for W the dequantised
weight:

    dr = dy        dz = dy * act'(z)        dx = dz W        db = sum over rows of dz

Rounding of activations is passed straight through (the straight-through estimator, Bengio et al. 2013): its derivative
is zero almost everywhere and of no use. z is recomputed in the backward pass, and only where an activation needs it.
``smooth_linear`` is the function that these are the gradients of, for all other modes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.activation import activation_gradient, apply_activation
from tilewright.kernels.checks import check_devices, check_epilogue, check_input, check_vector
from tilewright.kernels.dispatch.card import Arguments, Card, Kernel, Way
from tilewright.kernels.dispatch.derivatives import fold_rows, wide
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.formats.int4 import Int4
from tilewright.kernels.formats.weight import Draw, WeightFormat
from tilewright.kernels.quantizers import rows_of

#: The end of every schema's tensors, and of its options.
END = "Tensor? bias=None, Tensor? residual=None"
ACTIVATION = "str activation='none'"
#: The end of schemas of weight-only operators: whether to hold the weight dequantised as well. The router reads it.
KEEP = "bool keep_dequantized=False"
_WISHES = ("keep_dequantized",)
#: What quantises rows before a product of integers.
QUANTIZE = Kernel("..quantize.triton_quantize", rows_of("quantize_per_row"))


def linear_card(
    name: str,
    package: str,
    schema: str,
    weight: type[WeightFormat],
    weight_of: Callable[[Problem], WeightFormat],
    implementations: Sequence[Way],
    kernels: Sequence[Kernel] = (),
    remembered: bool = False,
) -> Card:
    """The card of a linear operator on weights of a format.

    weight_of: the very format in a problem. An operator whose rows come quantised has ``x_scale`` among its
    arguments, and their gradient in the place of that of x.
    """
    quantized = "x_scale" in schema
    options: dict[str, Any] = {"group_size": 32, "symmetric": False} if "group_size" in schema else {}
    return Card(
        name,
        package,
        schema,
        functools.partial(_check, weight),
        _problem,
        _fake,
        functools.partial(_sample, weight_of, schema),
        Problem(name, 5, 40, 96, torch.int8 if quantized else torch.float32, bias=True, activation="relu", **options),
        tuple(implementations),
        tuple(kernels),
        autocast=("x", "residual"),
        differentiable=("x_scale" if quantized else "x", "bias", "residual"),
        gradients=functools.partial(linear_gradients, weight),
        smooth=functools.partial(smooth_linear, weight),
        fold=fold_rows("x", "x_scale", "residual"),
        remembered=remembered,
        integer="compute_dtype" not in schema,
        weight_of=weight_of,
        wishes=tuple(name for name in _WISHES if name in schema),
    )


def _check(weight: type[WeightFormat], op: str, arguments: Arguments) -> int:
    """Raises for bad arguments; returns N."""
    x, x_scale = arguments["x"], arguments.get("x_scale")
    check_input(op, x, None if x_scale is None else torch.int8)
    check_devices(op, arguments)
    n = weight.check(op, arguments, x.shape[-1])
    check_epilogue(op, x, n, arguments["bias"], arguments["residual"], arguments["activation"])
    check_vector(op, "channel_scale", arguments.get("channel_scale"), x.shape[-1])
    if x_scale is not None and x_scale.dtype != torch.float32:
        raise TypeError(f"{op}: x_scale must be float32, not {x_scale.dtype}")
    if x_scale is not None and x_scale.shape != x.shape[:-1]:
        raise ValueError(f"{op}: x_scale must have shape {list(x.shape[:-1])}, not {list(x_scale.shape)}")
    return n


def _problem(op: str, arguments: Arguments, n: int) -> Problem:
    x, group_size = arguments["x"], arguments.get("group_size")
    facts: dict[str, Any] = {}
    if group_size is not None:
        scale = arguments["weight_scale"]
        symmetric = arguments["weight_zero"] is None
        facts = {"group_size": group_size, "symmetric": symmetric, "scale_dtype": scale.dtype}
    return Problem(
        op,
        math.prod(x.shape[:-1]),
        n,
        x.shape[-1],
        x.dtype,
        activation=arguments["activation"],
        bias=arguments["bias"] is not None,
        residual=arguments["residual"] is not None,
        compute_dtype=arguments.get("compute_dtype"),
        keep_dequantized=arguments.get("keep_dequantized", False),
        **facts,
        **device_facts(x.device),
    )


def _fake(arguments: Arguments, n: int) -> torch.Tensor:
    x = arguments["x"]
    dtype = (arguments["out_dtype"] or torch.float32) if "out_dtype" in arguments else x.dtype
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


def _sample(weight_of: Callable[[Problem], WeightFormat], schema: str, problem: Problem, draw: Draw) -> dict[str, Any]:
    """Sums are of order 1, as in a model whose activations are normalised. Scales and bias are of
    ``problem.scale_dtype`` where the operator lets them choose.
    """
    m, n, k = problem.m, problem.n, problem.k
    dtype = problem.out_dtype or (torch.bfloat16 if problem.x_dtype == torch.int8 else problem.x_dtype)
    if "x_scale" in schema:
        rows = {"x": draw.integers(-127, 128, m, k, dtype=torch.int8), "x_scale": draw.positive(m) / 73}
        end = {"out_dtype": dtype}
    else:
        rows, end = {"x": draw.normal(m, k, dtype=problem.x_dtype)}, {}
    group_size = problem.group_size or max(k, 1)
    options = {"channel_scale": None, "group_size": group_size, "compute_dtype": problem.compute_dtype}
    return {
        **rows,
        **weight_of(problem).sample(draw, n, k),
        "bias": draw.normal(n, dtype=dtype) if problem.bias else None,
        "residual": draw.normal(m, n, dtype=dtype) if problem.residual else None,
        "activation": problem.activation,
        **{name: value for name, value in options.items() if name in schema},
        **end,
    }


def dequantized_weight(
    weight: type[WeightFormat], arguments: Arguments, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The weight [N, K] that an operator called with ``arguments`` multiplies x with, float32 or float64."""
    k = arguments["x"].shape[-1]
    found = weight.of_arguments(arguments, k).dequantize(arguments, k, dtype)
    channel_scale = arguments.get("channel_scale")
    return found if channel_scale is None else found * channel_scale.to(dtype)


def smooth_linear(weight: type[WeightFormat], arguments: Arguments) -> torch.Tensor:
    """act(x W^T + b) + r in float32, or float64 for x of that; int8 rows times their scales."""
    x, (x_scale, bias, residual) = arguments["x"], map(arguments.get, ("x_scale", "bias", "residual"))
    dtype = wide(x)
    rows = x.to(dtype) if x_scale is None else x.to(dtype) * x_scale.unsqueeze(-1).to(dtype)
    matrix = dequantized_weight(weight, arguments, dtype)
    z = F.linear(rows, matrix, None if bias is None else bias.to(dtype))
    y = apply_activation(z, arguments["activation"])
    return y if residual is None else y + residual.to(dtype)


def linear_gradients(
    weight: type[WeightFormat], grad: torch.Tensor, arguments: Arguments, required: frozenset[str]
) -> dict[str, torch.Tensor | None]:
    """Gradients by argument name. grad: of the output. required: which of those that are differentiable are needed."""
    gradients: dict[str, torch.Tensor | None] = {}
    if "residual" in required:
        gradients["residual"] = grad.to(arguments["residual"].dtype)
    if not required - {"residual"}:
        return gradients
    x, bias, activation = arguments["x"], arguments["bias"], arguments["activation"]
    matrix = dequantized_weight(weight, arguments).to(grad.dtype)
    if activation != "none":
        rows = x.to(grad.dtype)
        if "x_scale" in arguments:
            rows = rows * arguments["x_scale"].unsqueeze(-1).to(grad.dtype)
        z = F.linear(rows, matrix, None if bias is None else bias.to(grad.dtype))
        grad = activation_gradient(z, grad, activation)
    if "x" in required:
        gradients["x"] = (grad @ matrix).to(x.dtype)
    if "x_scale" in required:
        gradients["x_scale"] = ((grad @ matrix).float() * x).sum(-1)
    if "bias" in required:
        rows = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])
        gradients["bias"] = rows.sum(0, dtype=torch.float32).to(bias.dtype)
    return gradients


def int4_weight(problem: Problem) -> Int4:
    """The int4 weight that a problem is about."""
    return Int4(problem.group_size or max(problem.k, 1), problem.symmetric, problem.scale_dtype)


def int8_rows(problem: Problem) -> Problem:
    """The problem of multiplying rows that are int8 already."""
    rows = rows_of("int8_linear_quantized")(problem)
    return replace(rows, n=problem.n, x_dtype=torch.int8)
