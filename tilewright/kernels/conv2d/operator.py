"""The card of ``conv2d_fused``: activation(conv(x) + bias + residual) in float."""

from __future__ import annotations

from typing import Any

import torch

from tilewright.kernels import convolution
from tilewright.kernels.conv_gradients import conv_gradients
from tilewright.kernels.dispatch.card import Card, everywhere, on_cpu, on_gpu
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
        convolution.float_problem,
        convolution.fake_float,
        _sample,
        convolution.example("conv2d_fused", torch.float32),
        implementations=(
            on_gpu("Triton, 1 x 1", ".triton_pointwise"),
            on_gpu("Triton, depthwise", ".triton_depthwise"),
            on_gpu("Triton, few channels", ".triton_stem"),
            on_gpu("Triton, implicit product", ".triton_implicit"),
            on_cpu("C", ".cpu"),
            on_cpu("oneDNN", ".cpu:onednn_conv2d_fused", ".cpu:why_not_onednn"),
            everywhere("reference", ".reference"),
        ),
        kernels=convolution.KERNELS,
        autocast=("x", "weight", "residual"),
        differentiable=("x", "weight", "bias", "residual"),
        gradients=conv_gradients,
    ),
)
