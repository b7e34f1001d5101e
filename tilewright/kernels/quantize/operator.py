"""The card of ``quantize_per_row``: float rows to int8 rows and their scales."""

from __future__ import annotations

from typing import Any

import torch

from tilewright.kernels.dispatch.card import Card, Kernel, everywhere, on_cpu, on_gpu
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats.weight import Draw
from tilewright.kernels.quantizers import check_quantizer, fake_quantized, quantizer_problem, rows_of


def _sample(problem: Problem, draw: Draw) -> dict[str, Any]:
    x = draw.normal(problem.m, problem.k, dtype=problem.x_dtype)
    return {"x": x, "channel_scale": draw.positive(problem.k) if problem.bias else None}


CARDS = (
    Card(
        "quantize_per_row",
        __package__,
        "(Tensor x, Tensor? channel_scale=None) -> (Tensor, Tensor)",
        check_quantizer,
        quantizer_problem,
        fake_quantized,
        _sample,
        example=Problem("quantize_per_row", 5, 0, 96, torch.float32),
        implementations=(
            on_gpu("Triton", ".triton_quantize"),
            on_cpu("blocks of rows", ".cpu"),
            everywhere("reference", ".reference"),
        ),
        kernels=(Kernel(".triton_quantize", rows_of("quantize_per_row")),),
        autocast=("x", "residual"),
    ),
)
