"""From the signature of a linear operator to matrices, and from launches to the result: what all launchers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from tilewright.aot.launch import Launch
from tilewright.kernels.activation import check_activation
from tilewright.kernels.epilogue import End
from tilewright.kernels.matrices import as_matrix


def run_linear(
    x: torch.Tensor,
    n: int,
    out_dtype: torch.dtype,
    plan: Callable[..., Iterable[Launch]],
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """The result [..., n] of ``x`` [..., K], filled by what ``plan`` launches for (result, ``**End``).

    ``plan`` gets the result as [M, n], bias [n] contiguous or None, and residual [M, n] or None. It is not called where
    there is nothing to fill, and each launch runs before the next is asked for.
    """
    check_activation(activation)
    out = torch.empty((*x.shape[:-1], n), dtype=out_dtype, device=x.device)
    if out.numel():
        rows = None if residual is None else as_matrix(residual.expand(out.shape))
        end = End(bias=None if bias is None else bias.contiguous(), residual=rows, activation=activation)
        for launch in plan(out.view(-1, n), **end):
            launch.run()
    return out
