"""The card of ``quantize_per_row``: float rows to int8 rows and their scales."""

from __future__ import annotations

from typing import Any

import torch

from tilewright.kernels.dispatch.card import Arguments, on_cpu
from tilewright.kernels.dispatch.derivatives import wide
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats.weight import Draw
from tilewright.kernels.quantizers import quantizer_card


def _sample(problem: Problem, draw: Draw) -> dict[str, Any]:
    x = draw.normal(problem.m, problem.k, dtype=problem.x_dtype)
    return {"x": x, "channel_scale": draw.positive(problem.k) if problem.bias else None}


def _rounded(arguments: Arguments) -> torch.Tensor:
    x, channel_scale = arguments["x"], arguments["channel_scale"]
    v = x.to(wide(x))
    return v if channel_scale is None else v * channel_scale.to(v.dtype)


CARDS = (
    quantizer_card(
        "quantize_per_row",
        __package__,
        "(Tensor x, Tensor? channel_scale=None) -> (Tensor, Tensor)",
        _sample,
        ".triton_quantize",
        on_cpu("blocks of rows", ".cpu"),
        rounded=_rounded,
    ),
)
