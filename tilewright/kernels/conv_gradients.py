"""Gradients of the float convolution with respect to x, weight, bias and residual.

With z = conv(x, w) + b + r and y = act(z):

    dz = dy * act'(z)        dr = dz        db = sum of dz over images and pixels

and dx, dw are those of a plain convolution. z is recomputed in the backward pass, and only where an activation needs
it. ``smooth_conv`` is the function that these are the gradients of, for all other modes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tilewright.kernels.activation import activation_gradient, apply_activation
from tilewright.kernels.conv2d.reference import convolve
from tilewright.kernels.conv_geometry import oihw, pad_image
from tilewright.kernels.dispatch.derivatives import wide


def smooth_conv(arguments: Mapping[str, Any]) -> torch.Tensor:
    """act(conv(x, w) + b + r) in float32, or float64 for x of that."""
    x, bias, residual = arguments["x"], arguments["bias"], arguments["residual"]
    dtype = wide(x)
    window = (arguments[name] for name in ("stride", "padding", "dilation", "groups"))
    z = convolve(x.to(dtype), arguments["weight"].to(dtype), *window)
    if bias is not None:
        z = z + bias.to(dtype).view(-1, 1, 1)
    if residual is not None:
        z = z + residual.to(dtype)
    return apply_activation(z, arguments["activation"], negative_slope=arguments["negative_slope"])


def conv_gradients(
    grad: torch.Tensor, arguments: Mapping[str, Any], required: frozenset[str]
) -> dict[str, torch.Tensor | None]:
    """Gradients by argument name, in their dtypes. grad: of the output. required: those that are needed."""
    x, weight = arguments["x"].to(grad.dtype), arguments["weight"].to(grad.dtype)
    bias, residual = arguments["bias"], arguments["residual"]
    if arguments["activation"] != "none":
        z = convolve(x, weight, *(arguments[name] for name in ("stride", "padding", "dilation", "groups")))
        if bias is not None:
            z = z + bias.to(z.dtype).view(-1, 1, 1)
        if residual is not None:
            z = z + residual.to(z.dtype)
        grad = activation_gradient(z, grad, arguments["activation"], arguments["negative_slope"])
    gradients: dict[str, torch.Tensor | None] = {}
    if "residual" in required:
        gradients["residual"] = grad.to(residual.dtype)
    if "bias" in required:
        gradients["bias"] = grad.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
    if required & {"x", "weight"}:
        found = _through_window(grad, x, weight, arguments, required)
        gradients |= {name: value.to(arguments[name].dtype) for name, value in found.items() if name in required}
    return gradients


def _through_window(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, arguments: Mapping[str, Any], required: frozenset[str]
) -> dict[str, torch.Tensor]:
    if 0 in (grad.shape[1], x.shape[1]):
        return {"x": torch.zeros_like(x), "weight": torch.zeros_like(weight)}
    image, symmetric = pad_image(x, arguments["padding"])
    stride, dilation, groups = arguments["stride"], arguments["dilation"], arguments["groups"]
    mask = ["x" in required, "weight" in required, False]
    dx, dw, _ = torch.ops.aten.convolution_backward(
        grad, image, oihw(weight), None, stride, list(symmetric), dilation, False, [0, 0], groups, mask
    )
    found = {}
    if dx is not None:
        if image is not x:
            top, _, left, _ = arguments["padding"]
            dx = dx[:, :, top : top + x.shape[2], left : left + x.shape[3]]
        found["x"] = dx
    if dw is not None:
        found["weight"] = dw.permute(0, 2, 3, 1)
    return found
