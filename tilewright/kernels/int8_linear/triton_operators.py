"""What both kernels of W8A8 share: what they decline, and the two operators by the launches of either."""

from __future__ import annotations

from collections.abc import Callable

import torch
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem, device_facts, rows_aligned
from tilewright.kernels.epilogue import End
from tilewright.kernels.matrices import FLOAT_DTYPES, rows_of
from tilewright.kernels.quantize.triton_quantize import quantize_per_row
from tilewright.kernels.triton.common import MAX_K, why_not_on_gpu
from tilewright.kernels.triton.linear import run_linear


def why_not_int8_product(problem: Problem) -> str | None:
    """Why no int8 matrix product of ours takes ``problem`` (dtype, length of the sums, device), or None."""
    if problem.x_dtype not in (*FLOAT_DTYPES, torch.int8):
        return f"takes float16, bfloat16 and float32, not {problem.x_dtype}"
    if problem.k > MAX_K:
        return f"sums of {problem.k} products may leave int32, which holds {MAX_K}"
    return why_not_on_gpu(problem)


def product_problem(x: torch.Tensor, n: int) -> Problem:
    """The problem of ``x`` int8 [M, K] times n rows."""
    m, k = x.shape
    return Problem("int8_linear_quantized", m, n, k, x.dtype, aligned=rows_aligned(x), **device_facts(x.device))


def operators(plan: Callable[..., list[Launch]]) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """``int8_linear`` and ``int8_linear_quantized`` by the launches that ``plan`` makes for matrices."""

    def int8_linear_quantized(
        x: torch.Tensor,
        x_scale: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        out_dtype: torch.dtype | None = None,
        **end: Unpack[End],
    ) -> torch.Tensor:
        """x int8 [..., K], x_scale float32 [...], weight int8 [N, K], weight_scale [N] -> out_dtype [..., N]."""

        def launches(out: torch.Tensor, **end: Unpack[End]) -> list[Launch]:
            scales = (x_scale.reshape(-1), weight_scale.contiguous())
            return plan(rows_of(x), scales[0], rows_of(weight), scales[1], out, **end)

        return run_linear(x, len(weight), out_dtype or torch.float32, launches, **end)

    def int8_linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        channel_scale: torch.Tensor | None = None,
        **end: Unpack[End],
    ) -> torch.Tensor:
        """x float [..., K], weight int8 [N, K], weight_scale [N], bias [N], residual [..., N] -> x.dtype [..., N]."""
        q, scale = quantize_per_row(x, channel_scale)
        return int8_linear_quantized(q, scale, weight, weight_scale, x.dtype, **end)

    return int8_linear, int8_linear_quantized
