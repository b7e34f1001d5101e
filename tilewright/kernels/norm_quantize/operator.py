"""The cards of ``rms_norm_quantize`` and ``layer_norm_quantize``: a norm whose result is quantised by rows."""

from __future__ import annotations

from typing import Any

import torch

from tilewright.kernels.dispatch.card import Card, Kernel, everywhere, on_gpu
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats.weight import Draw
from tilewright.kernels.quantizers import check_quantizer, fake_quantized, quantizer_problem, rows_of


def _sample(problem: Problem, draw: Draw) -> dict[str, Any]:
    dtype = problem.out_dtype or problem.x_dtype
    found = {
        "x": draw.normal(problem.m, problem.k, dtype=problem.x_dtype),
        "weight": draw.normal(problem.k, dtype=dtype),
    }
    return found if problem.op == "rms_norm_quantize" else {**found, "bias": draw.normal(problem.k, dtype=dtype)}


def _card(name: str, schema: str) -> Card:
    return Card(
        name,
        __package__,
        schema,
        check_quantizer,
        quantizer_problem,
        fake_quantized,
        _sample,
        example=Problem(name, 5, 0, 96, torch.float32),
        implementations=(on_gpu("Triton", ".triton_norm_quantize"), everywhere("reference", ".reference")),
        kernels=(Kernel(".triton_norm_quantize", rows_of(name)),),
        autocast=("x", "residual"),
    )


CARDS = (
    _card("rms_norm_quantize", "(Tensor x, Tensor? weight=None, float eps=1e-06) -> (Tensor, Tensor)"),
    _card(
        "layer_norm_quantize", "(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) -> (Tensor, Tensor)"
    ),
)
