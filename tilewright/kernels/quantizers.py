"""What the cards of operators share that make int8 rows of float rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewright.kernels.checks import check_devices, check_input, check_vector
from tilewright.kernels.dispatch.card import Arguments, Card, Kernel, Way, everywhere, on_gpu
from tilewright.kernels.dispatch.derivatives import fold_rows
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.formats.weight import Draw


def quantizer_card(
    name: str,
    package: str,
    schema: str,
    sample: Callable[[Problem, Draw], dict[str, Any]],
    kernel: str,
    *others: Way,
    rounded: Callable[[Arguments], torch.Tensor],
) -> Card:
    """The card of an operator that makes int8 rows and their scales. kernel: the module of the Triton kernel. others:
    implementations that follow it. rounded: what is rounded, [..., K] in float32 or float64, in operators of PyTorch.

    Integers have no derivative, as in PyTorch; the scales have that of the largest magnitude.
    """
    return Card(
        name,
        package,
        schema,
        _check,
        _problem,
        _fake,
        sample,
        example=Problem(name, 5, 0, 96, torch.float32),
        implementations=(on_gpu("Triton", kernel), *others, everywhere("reference", ".reference")),
        kernels=(Kernel(kernel, rows_of(name)),),
        autocast=("x", "residual"),
        differentiable=("x", "weight", "bias", "channel_scale"),
        smooth=lambda arguments: (None, _scale(rounded(arguments))),
        fold=fold_rows("x"),
    )


def _scale(v: torch.Tensor) -> torch.Tensor:
    if not v.shape[-1]:
        return v.new_ones(v.shape[:-1])
    scale = v.abs().amax(dim=-1) / 127
    return torch.where(scale == 0, 1.0, scale)


def _check(op: str, arguments: Arguments) -> int:
    """x is float [..., K] and every vector has its K elements; returns K."""
    check_input(op, arguments["x"])
    check_devices(op, arguments)
    k = arguments["x"].shape[-1]
    for name in ("weight", "bias", "channel_scale"):
        check_vector(op, name, arguments.get(name), k)
    return k


def _problem(op: str, arguments: Arguments, k: int) -> Problem:
    """As many rows as x has."""
    x = arguments["x"]
    return Problem(op, x.shape[:-1].numel(), k, k, x.dtype, **device_facts(x.device))


def _fake(arguments: Arguments, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [..., K] and float32 [...]."""
    x = arguments["x"]
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def rows_of(op: str) -> Callable[[Problem], Problem]:
    """The problem of quantising by ``op`` the rows that an operator's problem begins with."""
    facts = ("device", "capability", "gpu_arch", "multiprocessors", "device_name")

    def derive(problem: Problem) -> Problem:
        known: dict[str, Any] = {name: getattr(problem, name) for name in facts}
        return Problem(op, problem.m, 0, problem.k, problem.x_dtype, **known)

    return derive
