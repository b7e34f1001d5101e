"""The end of every linear operator: y = activation(accumulator + bias) + residual, then one cast."""

from __future__ import annotations

from typing import TypedDict

import torch

from tilewright.kernels.activation import apply_activation
from tilewright.kernels.cpu import native


class End(TypedDict):
    """What every linear operator ends in; implementations take it as ``**end`` and hand it on to ``finish``."""

    bias: torch.Tensor | None
    residual: torch.Tensor | None
    activation: str


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


def activate_in_place(y: torch.Tensor, activation: str, negative_slope: float = 0.01) -> torch.Tensor:
    """``apply_activation`` in place, on a CPU by the C kernel if there is one: PyTorch's own round otherwise where a
    vector is not full, so that a result depends on its place in the batch. Returns ``y``, or, of one that is traced and
    so has no memory to change, a new tensor.
    """
    if type(y) is not torch.Tensor:
        return apply_activation(y, activation, negative_slope=negative_slope)
    if activation == "none" or (y.is_cpu and native.activate(y, activation)):
        return y
    return apply_activation(y, activation, inplace=True, negative_slope=negative_slope)


def finish_rows(
    y: torch.Tensor,
    row_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Epilogue in place: ``y`` [M, N], float32 or float64, times ``row_scale`` [M, 1], plus bias, activation, plus
    residual, one cast.
    """
    if bias is not None and bias.dtype != y.dtype:
        bias = bias.to(y.dtype)
    if row_scale is not None and bias is not None:
        torch.addcmul(bias, y, row_scale, out=y)
    elif row_scale is not None:
        y.mul_(row_scale)
    elif bias is not None:
        y.add_(bias)
    y = activate_in_place(y, activation)
    if residual is not None:
        y.add_(residual.reshape(y.shape))
    return y if y.dtype == out_dtype else y.to(out_dtype)
