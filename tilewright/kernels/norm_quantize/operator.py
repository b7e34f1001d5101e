"""The cards of ``rms_norm_quantize`` and ``layer_norm_quantize``: a norm whose result is quantised by rows."""

from __future__ import annotations

from typing import Any

from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats.weight import Draw
from tilewright.kernels.quantizers import quantizer_card


def _sample(problem: Problem, draw: Draw) -> dict[str, Any]:
    dtype = problem.out_dtype or problem.x_dtype
    found = {
        "x": draw.normal(problem.m, problem.k, dtype=problem.x_dtype),
        "weight": draw.normal(problem.k, dtype=dtype),
    }
    return found if problem.op == "rms_norm_quantize" else {**found, "bias": draw.normal(problem.k, dtype=dtype)}


CARDS = tuple(
    quantizer_card(name, __package__, f"({schema}) -> (Tensor, Tensor)", _sample, ".triton_norm_quantize")
    for name, schema in (
        ("rms_norm_quantize", "Tensor x, Tensor? weight=None, float eps=1e-06"),
        ("layer_norm_quantize", "Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-05"),
    )
)
