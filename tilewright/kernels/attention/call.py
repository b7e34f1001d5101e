"""``attention`` in place of ``scaled_dot_product_attention``: whether it may be, and the short way to it."""

from __future__ import annotations

import torch

from tilewright.kernels.attention.operator import why_not_shapes
from tilewright.kernels.cpu.attention import FEW_QUERIES, routed_keys
from tilewright.kernels.cpu.recording import recorded
from tilewright.kernels.dispatch.layers import can_bypass_dispatcher, profiler_enabled
from tilewright.kernels.dispatch.router import resolve
from tilewright.kernels.dispatch.same import holds_values


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    sinks: torch.Tensor | None = None,
) -> bool:
    """Whether ``attention`` may stand in for ``scaled_dot_product_attention``: float32 inference, or
    of few queries bfloat16, on a CPU that nobody differentiates, exports, casts or batches, of arguments that both
    take.
    """
    given = [tensor for tensor in (query, key, value, mask, sinks) if tensor is not None]
    for tensor in given:
        if tensor.device.type != "cpu" or (tensor.requires_grad and torch.is_grad_enabled()):
            return False
        if not torch.compiler.is_compiling() and not holds_values(tensor):  # a graph asks the dispatcher
            return False
    if any(t.dim() != 4 or t.dtype != query.dtype for t in (query, key, value)) or torch.is_autocast_enabled("cpu"):
        return False
    if query.dtype != torch.float32 and (query.dtype != torch.bfloat16 or query.shape[2] > FEW_QUERIES):
        return False
    if why_not_shapes(query, key, value):
        return False
    if mask is not None:
        full = (*query.shape[:3], key.shape[2])
        if causal or mask.dim() > 4 or mask.dtype not in (torch.bool, torch.float32, query.dtype):
            return False
        if any(size not in (1, required) for size, required in zip(mask.shape[::-1], full[::-1], strict=False)):
            return False
    if sinks is not None and (not sinks.is_floating_point() or sinks.shape not in (query.shape[1:2], query.shape[:2])):
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return can_bypass_dispatcher(query, profiler=True, listeners=True)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``attention.reference``; for arguments that ``supports`` has accepted."""
    if torch.compiler.is_compiling() or profiler_enabled():
        return torch.ops.tilewright.attention(query, key, value, mask, causal, scale, sinks)
    return _attend(query, key, value, mask, causal, scale, sinks)


@recorded("attention")
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    batch, heads, queries, width = query.shape
    keys = routed_keys(queries, key.shape[2])
    function = resolve("attention", batch * heads * queries, keys, width, query.dtype, query.device)
    y: torch.Tensor = function(query, key, value, mask, causal, scale, sinks)
    return y
