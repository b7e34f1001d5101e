"""From the signature of the operator to matrices: what the launchers of all int8 matrix products share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tilewright.aot.launch import Launch
from tilewright.kernels.activation import check_activation
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.triton.common import FLOAT_DTYPES, as_matrix, why_not_on_gpu

#: Longest sum of products of int8 in [-127, 127] that cannot leave int32.
MAX_K = (2**31 - 1) // 127**2


def why_not_int8_product(problem: Problem) -> str | None:
    """Why no int8 matrix product of ours takes ``problem`` (dtype, length of the sums, device), or None."""
    if problem.x_dtype not in (*FLOAT_DTYPES, torch.int8):
        return f"takes float16, bfloat16 and float32, not {problem.x_dtype}"
    if problem.k > MAX_K:
        return f"sums of {problem.k} products may leave int32, which holds {MAX_K}"
    return why_not_on_gpu(problem)


def inner_contiguous(matrix: torch.Tensor) -> torch.Tensor:
    """``matrix`` itself if its rows are contiguous, else a copy: tensor cores want both operands contiguous along K."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


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
    check_activation(activation)
    n = weight.shape[0]
    out = torch.empty((*x.shape[:-1], n), dtype=out_dtype or torch.float32, device=x.device)
    if not out.numel():
        return out
    launches = plan(
        inner_contiguous(as_matrix(x)),
        x_scale.reshape(-1),
        inner_contiguous(weight),
        weight_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else as_matrix(residual.expand(out.shape)),
        activation,
        out.view(-1, n),
    )
    for launch in launches:
        launch.run()
    return out
