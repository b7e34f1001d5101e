"""2:4 pruning of one weight: which two of every four consecutive columns are kept, and what becomes of their values.

    magnitude   the larger |W|                                        no data
    wanda       the larger |W_ij| ||x_j||                             Sun et al. 2023, equation 1
    sparsegpt   the least sum of W_ij^2 / [H^-1]_jj^2, one group of columns after the other, and after each the
                columns to its right take over what the dropped weights contributed. Frantar and Alistarh 2023,
                algorithm 1; H = X^T X + damping, the inverse by its Cholesky factor

x_j is column j of the rows X [R, K] that reach the layer. Wanda keeps values as they are, SparseGPT changes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilewright.kernels.formats import sparse24
from tilewright.kernels.formats.int8 import check_weight

PRUNINGS = ("magnitude", "wanda", "sparsegpt")
#: Those that read the inputs of the layer.
CALIBRATED = ("wanda", "sparsegpt")
#: Columns whose errors are spread among themselves before the rest of the row hears of them. A multiple of four.
BLOCK = 128
#: Widest layer whose Hessian is inverted in float64.
_WIDE = 4096


@dataclass(frozen=True)
class Pruned:
    """weight: [N, K] in the dtype it came in, 0 where ``mask``, bool [N, K], is false."""

    weight: torch.Tensor
    mask: torch.Tensor


def check_pruning(name: object, known: tuple[str, ...] = PRUNINGS) -> None:
    """Raise ValueError unless ``name`` is one of ``known``."""
    if name not in known:
        raise ValueError(f"pruning must be one of {', '.join(known)}, not {name!r}")


def prune_magnitude(weight: torch.Tensor) -> Pruned:
    """Keep the larger two of every four of ``weight``, float [N, K]."""
    check_weight(weight)
    return _masked(weight, sparse24.best_mask(weight.detach().float().abs()))


def prune_wanda(weight: torch.Tensor, rows: torch.Tensor) -> Pruned:
    """Keep the two of every four that weigh most on the inputs ``rows``, float [R, K]."""
    norms = torch.linalg.vector_norm(_checked_rows(weight, rows), dim=0)
    return _masked(weight, sparse24.best_mask(weight.detach().float().abs() * norms))


def prune_sparsegpt(
    weight: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor | None = None, damping: float = 0.01
) -> Pruned:
    """Choose what to keep and adjust it, so that the output on ``rows`` [R, K] changes least.

    mask: bool [N, K]; if given, only the kept values are adjusted. damping: added to the diagonal of H, times its mean.
    """
    check_weight(weight)
    if mask is not None:
        sparse24.check_mask(mask, weight)
    if damping < 0:
        raise ValueError(f"damping must not be negative, not {damping}")
    k = weight.shape[1]
    dtype = torch.float64 if k <= _WIDE else torch.float32
    x = _checked_rows(weight, rows).to(dtype)
    factor = _inverse_factor(x.t() @ x, damping)
    left = weight.detach().to(dtype, copy=True)
    kept = torch.zeros_like(left, dtype=torch.bool) if mask is None else mask.clone()
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        block, diagonal = left[:, start:end], factor.diagonal()[start:end]
        errors = torch.zeros_like(block)
        for j in range(end - start):
            column = start + j
            if mask is None and j % sparse24.GROUP == 0:
                group = slice(j, min(j + sparse24.GROUP, end - start))
                kept[:, column : column + sparse24.GROUP] = sparse24.best_mask((block[:, group] / diagonal[group]) ** 2)
            dropped = block[:, j].masked_fill(kept[:, column], 0.0) / diagonal[j]
            block[:, j:] -= torch.outer(dropped, factor[column, column:end])
            errors[:, j] = dropped
        left[:, end:] -= errors @ factor[start:end, end:]
    return _masked(left.to(weight.dtype), kept)


def prune(
    weight: torch.Tensor, pruning: str = "magnitude", rows: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> Pruned:
    """One of the above by name. mask: given, so only "sparsegpt" still has something to do.

    Raises ValueError for an unknown name, for rows that are missing or of another width, and for a mask that is not
    2:4.
    """
    check_pruning(pruning)
    if pruning in CALIBRATED and rows is None and (mask is None or pruning == "sparsegpt"):
        raise ValueError(f"pruning {pruning!r} needs rows, inputs of the layer")
    if pruning == "sparsegpt" and rows is not None:
        return prune_sparsegpt(weight, rows, mask)
    if mask is not None:
        sparse24.check_mask(mask, weight)
        return _masked(weight, mask)
    return prune_magnitude(weight) if rows is None or pruning == "magnitude" else prune_wanda(weight, rows)


def _masked(weight: torch.Tensor, mask: torch.Tensor) -> Pruned:
    return Pruned(weight.detach().masked_fill(~mask, 0.0), mask)


def _checked_rows(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Float32 [R, K] beside the weight."""
    check_weight(weight)
    if rows.dim() != 2 or rows.shape[1] != weight.shape[1] or not len(rows):
        raise ValueError(f"rows must have shape [R, {weight.shape[1]}] with R > 0, not {list(rows.shape)}")
    rows = rows.detach().to(weight.device, torch.float32)
    if not torch.isfinite(rows).all():
        raise ValueError("rows must be finite, but hold NaN or Inf")
    return rows


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor U of the damped H^-1 = U^T U, whose row j holds what SparseGPT needs at column j."""
    diagonal = hessian.diagonal()
    # Inputs that are always 0 say nothing, and nothing depends on their weights.
    diagonal[diagonal == 0] = 1.0
    mean = diagonal.mean() if len(diagonal) else diagonal.new_ones(())
    # With fewer rows than columns the damping is all that makes H invertible, so it grows until it does.
    for factor in (damping, 0.1, 1.0):
        damped = hessian + factor * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    raise ValueError("the inputs of this layer are too large to prune by: their squares leave the range of float")
