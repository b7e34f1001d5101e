"""The cards of ``rms_norm_quantize`` and ``layer_norm_quantize``: a norm whose result is quantised by rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.dispatch.card import Arguments
from tilewright.kernels.dispatch.derivatives import wide
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


def _normalised(arguments: Arguments) -> torch.Tensor:
    x = arguments["x"].to(wide(arguments["x"]))
    weight, bias = (None if t is None else t.to(x.dtype) for t in (arguments["weight"], arguments.get("bias")))
    if "bias" in arguments:
        return F.layer_norm(x, x.shape[-1:], weight, bias, arguments["eps"])
    return F.rms_norm(x, x.shape[-1:], weight, arguments["eps"])


CARDS = tuple(
    quantizer_card(
        name,
        __package__,
        f"({schema}) -> (Tensor, Tensor)",
        _sample,
        ".triton_norm_quantize",
        rounded=_normalised,
    )
    for name, schema in (
        ("rms_norm_quantize", "Tensor x, Tensor? weight=None, float eps=1e-06"),
        ("layer_norm_quantize", "Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-05"),
    )
)
