"""What the launchers of 2:4 kernels share: what all decline, a call from tensors to result, the two operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.epilogue import End
from tilewright.kernels.matrices import FLOAT_DTYPES, rows_of
from tilewright.kernels.quantize.triton_quantize import quantize_per_row
from tilewright.kernels.triton.common import MAX_K, why_not_on_gpu
from tilewright.kernels.triton.linear import run_linear


def why_not_product(problem: Problem) -> str | None:
    """Why no kernel of ours multiplies ``problem`` by a 2:4 weight (device, dtypes, length of the sums), or None."""
    if reason := why_not_on_gpu(problem):
        return reason
    if problem.x_dtype not in FLOAT_DTYPES:
        return f"takes float16, bfloat16 and float32, not {problem.x_dtype}"
    if problem.op == "sparse24_int8_linear":
        if problem.k > MAX_K:
            return f"sums of {problem.k} products may leave int32, which holds {MAX_K}"
    elif problem.multiply_dtype not in (torch.float16, torch.bfloat16):
        return f"multiplies in float16 and bfloat16, not in {problem.multiply_dtype}"
    return None


def run(
    op: str,
    plan: Callable[..., list[Launch]],
    configure: Callable[[Problem], Any],
    x: torch.Tensor,
    weight: Any,
    out_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    scales: dict[str, torch.Tensor] | None = None,
    **end: Unpack[End],
) -> torch.Tensor:
    """x [..., K] times ``weight``, which has n rows in the order of the kernel that ``plan`` launches -> [..., n].

    configure: from a problem to the launch configuration. scales: x_scale [M] and w_scale [n] of int8.
    """

    def launches(out: torch.Tensor, **end: Unpack[End]) -> list[Launch]:
        config = configure(Problem(op, len(out), weight.n, x.shape[-1], x.dtype, **device_facts(x.device)))
        return plan(rows_of(x), weight, out, compute_dtype=compute_dtype, config=config, **(scales or {}), **end)

    return run_linear(x, weight.n, out_dtype, launches, **end)


def operators(
    plan: Callable[..., list[Launch]], configure: Callable[[Problem], Any], order: Callable[..., Any]
) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """``sparse24_linear`` and ``sparse24_int8_linear`` by the launches that ``plan`` makes for matrices.

    order: from values, places, K and the dtype of the product to the weight as the kernel takes it.
    """

    def sparse24_linear(
        x: torch.Tensor,
        weight_values: torch.Tensor,
        weight_meta: torch.Tensor,
        compute_dtype: torch.dtype | None = None,
        **end: Unpack[End],
    ) -> torch.Tensor:
        """See ``reference.sparse24_linear``."""
        narrow = compute_dtype or x.dtype
        weight = order(weight_values, weight_meta, x.shape[-1], narrow)
        return run("sparse24_linear", plan, configure, x, weight, x.dtype, narrow, **end)

    def sparse24_int8_linear(
        x: torch.Tensor,
        weight_values: torch.Tensor,
        weight_meta: torch.Tensor,
        weight_scale: torch.Tensor,
        channel_scale: torch.Tensor | None = None,
        **end: Unpack[End],
    ) -> torch.Tensor:
        """See ``reference.sparse24_int8_linear``."""
        q, x_scale = quantize_per_row(x, channel_scale)
        scales = {"x_scale": x_scale.reshape(-1), "w_scale": weight_scale.contiguous()}
        weight = order(weight_values, weight_meta, x.shape[-1], torch.int8)
        return run("sparse24_int8_linear", plan, configure, q, weight, x.dtype, torch.int8, scales, **end)

    return sparse24_linear, sparse24_int8_linear
