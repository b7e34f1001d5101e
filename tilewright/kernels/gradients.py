"""Gradients of the quantised linear operators with respect to x, bias and residual, so that adapters train on a
quantised base.

Weights are constants. With z = x W^T + b and y = act(z) + r, for W the dequantised weight:

    dr = dy        dz = dy * act'(z)        dx = dz W        db = sum over rows of dz

Rounding of activations is passed straight through (the straight-through estimator, Bengio et al. 2013): its derivative
is zero almost everywhere and of no use. z is recomputed in the backward pass, and only where an activation needs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.activation import activation_gradient
from tilewright.kernels.formats import int4, int8, sparse24


def dequantized_weight(arguments: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [N, K] that an operator called with ``arguments`` multiplies x with, float32 or float64."""
    if "weight_values" in arguments:
        weight = _unpacked_weight(arguments, dtype)
    elif "weight_packed" in arguments:
        weight = int4.dequantize(
            arguments["weight_packed"],
            arguments["weight_scale"],
            arguments["weight_zero"],
            arguments["group_size"],
            arguments["x"].shape[-1],
            dtype,
        )
    else:
        weight = int8.dequantize(arguments["weight"], arguments["weight_scale"], dtype)
    channel_scale = arguments.get("channel_scale")
    return weight if channel_scale is None else weight * channel_scale.to(dtype)


def _unpacked_weight(arguments: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    values, k = arguments["weight_values"], arguments["x"].shape[-1]
    if "group_size" in arguments:
        kept, group_size = sparse24.kept_count(k), sparse24.kept_group_size(k, arguments["group_size"])
        values = int4.dequantize(values, arguments["weight_scale"], arguments["weight_zero"], group_size, kept, dtype)
    elif "weight_scale" in arguments:
        values = int8.dequantize(values, arguments["weight_scale"], dtype)
    return sparse24.unpack(values, arguments["weight_meta"], k).to(dtype)


def linear_gradients(
    grad: torch.Tensor, arguments: Mapping[str, Any], required: frozenset[str]
) -> dict[str, torch.Tensor | None]:
    """Gradients by argument name. grad: of the output. wanted: those of "x", "bias" and "residual" that are needed."""
    gradients: dict[str, torch.Tensor | None] = {}
    if "residual" in required:
        gradients["residual"] = grad.to(arguments["residual"].dtype)
    if not required & {"x", "bias"}:
        return gradients
    x, bias, activation = arguments["x"], arguments["bias"], arguments["activation"]
    weight = dequantized_weight(arguments).to(grad.dtype)
    if activation != "none":
        if "x_scale" in arguments:
            x = x.to(grad.dtype) * arguments["x_scale"].unsqueeze(-1).to(grad.dtype)
        z = F.linear(x.to(grad.dtype), weight, None if bias is None else bias.to(grad.dtype))
        grad = activation_gradient(z, grad, activation)
    if "x" in required:
        gradients["x"] = (grad @ weight).to(x.dtype)
    if "bias" in required:
        rows = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])
        gradients["bias"] = rows.sum(0, dtype=torch.float32).to(bias.dtype)
    return gradients
