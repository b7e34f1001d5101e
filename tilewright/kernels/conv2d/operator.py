"""The card of ``conv2d_fused``: activation(conv(x) + bias + residual) in float."""

from __future__ import annotations

from typing import Any

import torch

from tilewright.kernels import convolution
from tilewright.kernels.conv_gradients import conv_gradients, smooth_conv
from tilewright.kernels.dispatch.card import Card, everywhere, on_cpu
from tilewright.kernels.dispatch.derivatives import fold_images
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats.weight import Draw


def _sample(problem: Problem, draw: Draw) -> dict[str, Any]:
    sizes, x = convolution.sizes_of(problem), convolution.input_of(problem, draw)
    weight = draw.normal(sizes.out_channels, *sizes.kernel, sizes.group_channels, dtype=torch.float32)
    weight = (weight * convolution.spread_of(problem)).to(problem.x_dtype)
    return {"x": x, "weight": weight, **convolution.rest_of(problem, draw), "allow_tf32": problem.allow_tf32}


CARDS = (
    Card(
        "conv2d_fused",
        __package__,
        "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, "
        f"{convolution.WINDOW}, {convolution.ACTIVATION}, bool allow_tf32=False) -> Tensor",
        convolution.check_float,
        convolution.posed,
        convolution.fake,
        _sample,
        convolution.example("conv2d_fused", torch.float32),
        implementations=(
            *convolution.ON_GPU,
            on_cpu("C", ".cpu"),
            on_cpu("oneDNN", ".cpu:onednn_conv2d_fused", ".cpu:why_not_onednn"),
            everywhere("reference", ".reference"),
        ),
        kernels=convolution.KERNELS,
        autocast=("x", "weight", "residual"),
        differentiable=("x", "weight", "bias", "residual"),
        gradients=conv_gradients,
        smooth=smooth_conv,
        fold=fold_images("x", "residual"),
    ),
)
