"""What the operators demand of their arguments, said in words that name the operator and the argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tilewright.kernels.activation import check_activation
from tilewright.kernels.formats import int4, sparse24
from tilewright.kernels.formats.weight import INPUT_DTYPES as INPUT_DTYPES
from tilewright.kernels.formats.weight import SCALE_DTYPES as SCALE_DTYPES


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


def check_int8_weight(op: str, x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> int:
    """The canonical int8 weight fits x; returns N."""
    if weight.dtype != torch.int8:
        raise TypeError(f"{op}: weight must be int8, not {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be a matrix [N, K], not of shape {list(weight.shape)}")
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"{op}: the last dimension of x is {x.shape[-1]}, but the weight takes {k}")
    if weight_scale.dtype != torch.float32:
        raise TypeError(f"{op}: weight_scale must be float32, not {weight_scale.dtype}")
    check_vector(op, "weight_scale", weight_scale, n)
    return n


def check_int4_weight(
    op: str,
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    group_size: int,
) -> int:
    """The canonical int4 weight fits x; returns N."""
    if group_size <= 0:
        raise ValueError(f"{op}: group_size must be positive, not {group_size}")
    if weight_packed.dtype != torch.int32:
        raise TypeError(f"{op}: weight_packed must be int32, not {weight_packed.dtype}")
    if weight_packed.dim() != 2:
        raise ValueError(
            f"{op}: weight_packed must be a matrix [N, ceil(K / 8)], not of shape {list(weight_packed.shape)}"
        )
    n, k = weight_packed.shape[0], x.shape[-1]
    if weight_packed.shape[1] != int4.group_count(k, 8):
        raise ValueError(
            f"{op}: the last dimension of x is {k}, which needs {int4.group_count(k, 8)} words a row, "
            f"but weight_packed has {weight_packed.shape[1]}"
        )
    _check_int4_scales(op, n, int4.group_count(k, group_size), group_size, weight_scale, weight_zero)
    return n


def _check_int4_scales(
    op: str,
    n: int,
    groups: int,
    group_size: int,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
) -> None:
    if weight_scale.dtype not in SCALE_DTYPES:
        raise TypeError(f"{op}: weight_scale must be float16, bfloat16 or float32, not {weight_scale.dtype}")
    if weight_scale.shape != (n, groups):
        raise ValueError(
            f"{op}: weight_scale must have shape {[n, groups]} for group_size {group_size}, "
            f"not {list(weight_scale.shape)}"
        )
    if weight_zero is not None:
        shape = (int4.group_count(n, 8), groups)
        if weight_zero.dtype != torch.int32:
            raise TypeError(f"{op}: weight_zero must be int32, not {weight_zero.dtype}")
        if weight_zero.shape != shape:
            raise ValueError(f"{op}: weight_zero must have shape {list(shape)}, not {list(weight_zero.shape)}")


def check_sparse24_weight(
    op: str,
    x: torch.Tensor,
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    weight_scale: torch.Tensor | None = None,
    weight_zero: torch.Tensor | None = None,
    group_size: int | None = None,
) -> int:
    """The canonical 2:4 weight fits x; returns N. group_size: given for int4 values alone, weight_scale for integers.

    The places in ``weight_meta`` are not looked at: that would wait for the device.
    """
    k = x.shape[-1]
    for name, value in (("weight_values", weight_values), ("weight_meta", weight_meta)):
        if value.dim() != 2:
            raise ValueError(f"{op}: {name} must be a matrix, not of shape {list(value.shape)}")
    if weight_meta.dtype != torch.uint8:
        raise TypeError(f"{op}: weight_meta must be uint8, not {weight_meta.dtype}")
    n = weight_values.shape[0]
    if weight_meta.shape != (n, sparse24.meta_count(k)):
        raise ValueError(
            f"{op}: the last dimension of x is {k}, so weight_meta must have shape {[n, sparse24.meta_count(k)]}, "
            f"not {list(weight_meta.shape)}"
        )
    if group_size is not None and weight_scale is not None:
        if group_size <= 0 or (group_size < k and group_size % sparse24.GROUP):
            raise ValueError(
                f"{op}: group_size must be a multiple of {sparse24.GROUP} or the whole row, not {group_size}"
            )
        if weight_values.dtype != torch.int32:
            raise TypeError(f"{op}: weight_values must be int32, not {weight_values.dtype}")
        width = int4.group_count(sparse24.kept_count(k), 8)
        _check_int4_scales(op, n, int4.group_count(k, group_size), group_size, weight_scale, weight_zero)
    elif weight_scale is not None:
        width = sparse24.kept_count(k)
        if weight_values.dtype != torch.int8:
            raise TypeError(f"{op}: weight_values must be int8, not {weight_values.dtype}")
        if weight_scale.dtype != torch.float32:
            raise TypeError(f"{op}: weight_scale must be float32, not {weight_scale.dtype}")
        check_vector(op, "weight_scale", weight_scale, n)
    else:
        width = sparse24.kept_count(k)
        if weight_values.dtype not in INPUT_DTYPES:
            raise TypeError(
                f"{op}: weight_values must be a float tensor of 16, 32 or 64 bits, not {weight_values.dtype}"
            )
    if weight_values.shape[1] != width:
        raise ValueError(
            f"{op}: the last dimension of x is {k}, so weight_values must have shape {[n, width]}, "
            f"not {list(weight_values.shape)}"
        )
    return n
