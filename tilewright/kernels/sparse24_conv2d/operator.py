"""The card of ``sparse24_conv2d_fused``: a float convolution whose weight is 2:4 along the input channels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from tilewright.kernels import convolution
from tilewright.kernels.checks import check_input
from tilewright.kernels.conv_gradients import conv_gradients, smooth_conv
from tilewright.kernels.dispatch.card import Arguments, Card, everywhere
from tilewright.kernels.dispatch.derivatives import fold_images
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats import sparse24
from tilewright.kernels.formats.weight import Draw, Float, check_dtype
from tilewright.kernels.sparse24_conv2d.reference import unpack_weight


def _check(op: str, arguments: Arguments) -> convolution.Checked:
    """As of ``conv2d_fused``, of the shape that the 2:4 weight stands for."""
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
    check_dtype(op, "weight_meta", meta, torch.uint8)
    channels, window = x.shape[1] // groups, kernel_size[0] * kernel_size[1]
    rows, columns = values.shape[0], (sparse24.kept_count(channels), sparse24.meta_count(channels))
    if rows % window or meta.shape[0] != rows or (values.shape[1], meta.shape[1]) != columns:
        raise ValueError(
            f"{op}: for {channels} channels and a window of {kernel_size}, weight_values and weight_meta must have "
            f"{columns[0]} and {columns[1]} columns and a multiple of {window} rows, "
            f"not shapes {list(values.shape)} and {list(meta.shape)}"
        )
    # A weight of that shape without memory.
    dense = x.new_empty(()).expand(rows // window, *kernel_size, channels)
    return convolution.check_float(op, {**arguments, "weight": dense})


def _dense(arguments: Arguments) -> Arguments:
    names = ("x", "weight_values", "weight_meta", "kernel_size", "groups")
    return {**arguments, "weight": unpack_weight(*(arguments[name] for name in names))}


def _gradients(grad: torch.Tensor, arguments: Arguments, required: frozenset[str]) -> Mapping[str, torch.Tensor | None]:
    return conv_gradients(grad, _dense(arguments), required)


def _sample(problem: Problem, draw: Draw) -> dict[str, Any]:
    sizes, x = convolution.sizes_of(problem), convolution.input_of(problem, draw)
    rows = sizes.out_channels * math.prod(sizes.kernel)
    spread = 2**0.5 * convolution.spread_of(problem)
    weight = sparse24.Sparse24(Float(problem.x_dtype)).sample(draw, rows, sizes.group_channels, spread)
    rest = {"kernel_size": list(sizes.kernel), **convolution.rest_of(problem, draw), "allow_tf32": problem.allow_tf32}
    return {"x": x, **weight, **rest}


CARDS = (
    Card(
        "sparse24_conv2d_fused",
        __package__,
        "(Tensor x, Tensor weight_values, Tensor weight_meta, Tensor? bias=None, Tensor? residual=None, "
        f"int[2] kernel_size=1, {convolution.WINDOW}, {convolution.ACTIVATION}, bool allow_tf32=False) -> Tensor",
        _check,
        convolution.posed,
        convolution.fake,
        _sample,
        convolution.example("sparse24_conv2d_fused", torch.float32),
        implementations=(
            everywhere("unpacked once, then dense", ".dense", handed_on="..convolution:as_float"),
            everywhere("reference", ".reference"),
        ),
        autocast=("x", "residual"),
        differentiable=("x", "bias", "residual"),
        gradients=_gradients,
        smooth=lambda arguments: smooth_conv(_dense(arguments)),
        fold=fold_images("x", "residual"),
    ),
)
