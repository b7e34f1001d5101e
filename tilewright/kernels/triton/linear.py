"""From the signature of a linear operator to matrices, and from launches to the result: what all launchers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from tilewright.aot.launch import Launch
from tilewright.kernels.activation import check_activation
from tilewright.kernels.matrices import as_matrix


def run_linear(
    x: torch.Tensor,
    n: int,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    plan: Callable[[torch.Tensor | None, torch.Tensor | None, torch.Tensor], Iterable[Launch]],
) -> torch.Tensor:
    """The result [..., n] of ``x`` [..., K], filled by what ``plan`` launches for (bias, residual, result).

    ``plan`` gets bias [n] contiguous or None, residual [M, n] or None, and the result as [M, n]. It is not called where
    there is nothing to fill, and each launch runs before the next is asked for.
    """
    check_activation(activation)
    out = torch.empty((*x.shape[:-1], n), dtype=out_dtype, device=x.device)
    if out.numel():
        rows = None if residual is None else as_matrix(residual.expand(out.shape))
        for launch in plan(None if bias is None else bias.contiguous(), rows, out.view(-1, n)):
            launch.run()
    return out
