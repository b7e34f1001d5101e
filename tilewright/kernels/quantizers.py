"""What the cards of operators share that make int8 rows of float rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewright.kernels.checks import check_devices, check_input, check_vector
from tilewright.kernels.dispatch.card import Arguments
from tilewright.kernels.dispatch.problem import Problem, device_facts


def check_quantizer(op: str, arguments: Arguments) -> int:
    """x is float [..., K] and every vector has its K elements; returns K."""
    check_input(op, arguments["x"])
    check_devices(op, arguments)
    k = arguments["x"].shape[-1]
    for name in ("weight", "bias", "channel_scale"):
        check_vector(op, name, arguments.get(name), k)
    return k


def quantizer_problem(op: str, arguments: Arguments, k: int) -> Problem:
    """As many rows as x has."""
    x = arguments["x"]
    return Problem(op, x.shape[:-1].numel(), k, k, x.dtype, **device_facts(x.device))


def fake_quantized(arguments: Arguments, k: int) -> tuple[torch.Tensor, torch.Tensor]:
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
