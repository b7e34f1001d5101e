"""The operator ``tilewright::attention``, for inference alone, and the short cut to what serves it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tilewright.kernels.dispatch.layers import can_bypass_dispatcher, profiler_enabled
from tilewright.kernels.dispatch.operator import Arguments, Operator, define
from tilewright.kernels.dispatch.router import resolve
from tilewright.kernels.registry import register_attention


def _check(op: str, arguments: Arguments) -> None:
    query, key, value, mask = (arguments[name] for name in ("query", "key", "value", "mask"))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be float, not {tensor.dtype}")
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} must be [batch, heads, length, width], not of shape {list(tensor.shape)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise TypeError(f"{op}: {name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on {query.device}")
    if reason := _why_not_shapes(query, key, value):
        raise ValueError(f"{op}: {reason}")
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{op}: mask must be bool or float, not {mask.dtype}")
        full = (*query.shape[:3], key.shape[2])
        try:
            fits = torch.broadcast_shapes(mask.shape, full) == full
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"{op}: mask of shape {list(mask.shape)} does not broadcast to {list(full)}")


def _why_not_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    (batch, heads, _, width), kept = query.shape, key.shape
    if kept[0] != batch or kept[3] != width or value.shape[:3] != kept[:3]:
        return f"query {list(query.shape)}, key {list(kept)} and value {list(value.shape)} do not belong together"
    if heads % kept[1] if kept[1] else heads:
        return f"{heads} heads of query cannot share {kept[1]} heads of key"
    return None


def _serve(query: torch.Tensor, key: torch.Tensor) -> Callable[..., torch.Tensor]:
    batch, heads, queries, width = query.shape
    return resolve("attention", batch * heads * queries, key.shape[2], width, query.dtype, query.device)


def _implementation(op: str, arguments: Arguments) -> Callable[..., torch.Tensor]:
    _check(op, arguments)
    return _serve(arguments["query"], arguments["key"])


def _fake(arguments: Arguments, checked: None) -> torch.Tensor:
    query, value = arguments["query"], arguments["value"]
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)


ATTENTION = Operator(
    "attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask=None, bool causal=False, float? scale=None) -> Tensor",
    _check,
    _implementation,
    _fake,
    autocast=("query", "key", "value"),
)


def supports(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> bool:
    """Whether ``attention`` may stand in for ``scaled_dot_product_attention``: float32 inference on a CPU that nobody
    differentiates, exports, casts or batches, of arguments that both take.
    """
    given = [query, key, value] if mask is None else [query, key, value, mask]
    for tensor in given:
        if tensor.device.type != "cpu" or (tensor.requires_grad and torch.is_grad_enabled()):
            return False
    if any(t.dim() != 4 or t.dtype != torch.float32 for t in (query, key, value)) or torch.is_autocast_enabled("cpu"):
        return False
    if _why_not_shapes(query, key, value):
        return False
    if mask is not None:
        full = (*query.shape[:3], key.shape[2])
        if causal or mask.dim() > 4 or mask.dtype not in (torch.bool, torch.float32):
            return False
        if any(size not in (1, required) for size, required in zip(mask.shape[::-1], full[::-1], strict=False)):
            return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return can_bypass_dispatcher(query, profiler=True)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """See ``attention.reference``; for arguments that ``supports`` has accepted."""
    if torch.compiler.is_compiling() or profiler_enabled():
        return torch.ops.tilewright.attention(query, key, value, mask, causal, scale)
    return _serve(query, key)(query, key, value, mask, causal, scale)


register_attention()
define(ATTENTION)
