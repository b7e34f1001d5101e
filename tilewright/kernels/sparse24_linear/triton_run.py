"""What the launchers of 2:4 kernels share: one call from tensors to result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.matrices import rows_of
from tilewright.kernels.triton.linear import run_linear


def run(
    op: str,
    plan: Callable[..., list[Launch]],
    configure: Callable[[Problem], Any],
    x: torch.Tensor,
    weight: Any,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """x [..., K] times ``weight``, which has n rows in the order of the kernel that ``plan`` launches -> [..., n].

    configure: from a problem to the launch configuration. options: further arguments of ``plan``.
    """

    def launches(bias: torch.Tensor | None, residual: torch.Tensor | None, out: torch.Tensor) -> list[Launch]:
        problem = Problem(op, len(out), weight.n, x.shape[-1], x.dtype, **device_facts(x.device))
        return plan(
            rows_of(x),
            weight,
            bias,
            residual,
            out,
            activation=activation,
            compute_dtype=compute_dtype,
            config=configure(problem),
            x_scale=None if x_scale is None else x_scale.reshape(-1),
            w_scale=None if w_scale is None else w_scale.contiguous(),
            **options,
        )

    return run_linear(x, weight.n, out_dtype, bias, residual, activation, launches)
