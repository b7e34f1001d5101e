"""What the launchers of 2:4 kernels share: one call from tensors to result, and the second launch where K is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewright.aot.launch import Launch
from tilewright.kernels.activation import check_activation
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.triton.common import as_matrix
from tilewright.kernels.triton.split_k import plan_reduce_parts
from tilewright.kernels.triton.tiles import finish_arguments, plan_sum_parts, rows_of


def with_parts(
    product: Launch,
    workspace: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    activation: str,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
) -> list[Launch]:
    """``product``, and after it the sum over the parts that it leaves in ``workspace`` [parts, M, N], if there is one.

    Parts of int8 products are int32 and come with x_scale [M] and w_scale [N].
    """
    if workspace is None:
        return [product]
    if workspace.dtype != torch.int32:
        return [product, plan_sum_parts(workspace, None, bias, residual, out, activation)]
    sizes = {"M": out.shape[0], "N": out.shape[1]}
    scales = {"x_scale_ptr": x_scale, "w_scale_ptr": w_scale}
    epilogue = {**finish_arguments(bias, residual, out), **scales, **sizes}
    return [product, plan_reduce_parts(workspace, epilogue, activation)]


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
    check_activation(activation)
    out = torch.empty(*x.shape[:-1], weight.n, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    problem = Problem(op, out.numel() // weight.n, weight.n, x.shape[-1], x.dtype, **device_facts(x.device))
    launches = plan(
        rows_of(x),
        weight,
        None if bias is None else bias.contiguous(),
        None if residual is None else as_matrix(residual.expand(out.shape)),
        as_matrix(out),
        activation=activation,
        compute_dtype=compute_dtype,
        config=configure(problem),
        x_scale=None if x_scale is None else x_scale.reshape(-1),
        w_scale=None if w_scale is None else w_scale.contiguous(),
        **options,
    )
    for launch in launches:
        launch.run()
    return out
