"""The end of every linear operator: y = activation(accumulator + bias) + residual, then one cast."""

from __future__ import annotations

import torch

from tilewright.kernels.activation import apply_activation


def finish(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Epilogue of the references. ``y`` [..., N] in the arithmetic's dtype, which bias and residual are widened to."""
    if bias is not None:
        y = y + bias.to(y.dtype)
    y = apply_activation(y, activation)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.to(out_dtype)
