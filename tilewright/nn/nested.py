"""Nested tensors, whose rows a linear layer takes as those of one matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def on_rows(layer: Callable[..., torch.Tensor], x: Any, residual: Any = None) -> torch.Tensor:
    """``layer`` on a nested ``x``, ``torch.jagged`` or ``torch.strided``, and a residual nested alike.

    The result is nested as ``x`` is; of a jagged one it has the very offsets, so that both can be added.
    """
    if x.layout != torch.jagged:
        parts = [x.unbind(), *([] if residual is None else [residual.unbind()])]
        return torch.nested.as_nested_tensor([layer(*each) for each in zip(*parts, strict=True)])
    rows = layer(x.values(), None if residual is None else residual.values())
    return torch.nested.nested_tensor_from_jagged(
        rows, offsets=x.offsets(), lengths=x.lengths(), jagged_dim=x._ragged_idx
    )
