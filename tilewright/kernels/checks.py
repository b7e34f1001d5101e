"""What the operators demand of their arguments, said in words that name the operator and the argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tilewright.kernels.activation import check_activation
from tilewright.kernels.formats.weight import INPUT_DTYPES


def check_input(op: str, x: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """``x`` has at least one dimension and is float, or of the dtype given."""
    if dtype is None and x.dtype not in INPUT_DTYPES:
        raise TypeError(f"{op}: x must be a float tensor of 16, 32 or 64 bits, not {x.dtype}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{op}: x must be {dtype}, not {x.dtype}")
    if not x.dim():
        raise ValueError(f"{op}: x must have at least one dimension")


def check_devices(op: str, arguments: Mapping[str, Any]) -> None:
    """All tensors are where x is: kernels read memory and cannot tell."""
    device = arguments["x"].device
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device != device:
            raise ValueError(f"{op}: x is on {device}, but {name} is on {value.device}")


def check_vector(op: str, name: str, value: torch.Tensor | None, length: int) -> None:
    """``value``, if given, is a float vector of that length."""
    if value is None:
        return
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be a float tensor, not {value.dtype}")
    if value.dim() != 1 or value.shape[0] != length:
        raise ValueError(f"{op}: {name} must have shape [{length}], not {list(value.shape)}")


def check_epilogue(
    op: str, x: torch.Tensor, n: int, bias: torch.Tensor | None, residual: torch.Tensor | None, activation: str
) -> None:
    """Bias [n], residual [..., n] as x leads, a known activation."""
    check_activation(activation)
    check_vector(op, "bias", bias, n)
    if residual is None:
        return
    if not residual.is_floating_point():
        raise TypeError(f"{op}: residual must be a float tensor, not {residual.dtype}")
    if residual.dim() != x.dim() or residual.shape[:-1] != x.shape[:-1] or residual.shape[-1] != n:
        raise ValueError(f"{op}: residual must have shape {[*x.shape[:-1], n]}, not {list(residual.shape)}")
