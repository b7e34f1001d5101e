"""From the signature of the operator to matrices: what the launchers of all int8 matrix products share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.matrices import FLOAT_DTYPES, rows_of
from tilewright.kernels.triton.common import why_not_on_gpu
from tilewright.kernels.triton.linear import run_linear

#: Longest sum of products of int8 in [-127, 127] that cannot leave int32.
MAX_K = (2**31 - 1) // 127**2


def why_not_int8_product(problem: Problem) -> str | None:
    """Why no int8 matrix product of ours takes ``problem`` (dtype, length of the sums, device), or None."""
    if problem.x_dtype not in (*FLOAT_DTYPES, torch.int8):
        return f"takes float16, bfloat16 and float32, not {problem.x_dtype}"
    if problem.k > MAX_K:
        return f"sums of {problem.k} products may leave int32, which holds {MAX_K}"
    return why_not_on_gpu(problem)


def run_quantized(
    plan: Callable[..., list[Launch]],
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """Allocate the result of ``int8_linear_quantized`` [..., N] and run the launches that ``plan`` makes for it."""

    def launches(bias: torch.Tensor | None, residual: torch.Tensor | None, out: torch.Tensor) -> list[Launch]:
        scales = (x_scale.reshape(-1), weight_scale.contiguous())
        return plan(rows_of(x), scales[0], rows_of(weight), scales[1], bias, residual, activation, out)

    return run_linear(x, len(weight), out_dtype or torch.float32, bias, residual, activation, launches)
