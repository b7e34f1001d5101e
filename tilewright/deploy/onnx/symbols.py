"""Operators ``tilewright::*`` as single ONNX nodes of a domain of that name, which ``onnx_lower`` then writes out.

PyTorch's exporter knows nothing of our operators. As a decomposition each becomes ``torch.onnx.ops.symbolic``: a node
with the operator's tensors as inputs and all else as attributes. Packed weights reach it untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewright.kernels.dispatch.card import Card, cards
from tilewright.kernels.dispatch.library import NAMESPACE


def overload(name: str) -> Any:
    """``torch.ops.tilewright.<name>.default``."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def arguments_of(name: str) -> list[Any]:
    """What the schema of an operator declares."""
    return list(overload(name)._schema.arguments)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """For ``ExportedProgram.run_decompositions``: every operator of Tilewright, and no other."""
    return {overload(card.name): _symbol(card) for card in cards()}


def _symbol(card: Card) -> Callable[..., Any]:
    declared = arguments_of(card.name)
    defaults = {each.name: each.default_value for each in declared if each.has_default_value()}
    tensors = [each.name for each in declared if "Tensor" in str(each.type)]

    def decomposed(*args: Any, **kwargs: Any) -> Any:
        given = {**defaults, **dict(zip((each.name for each in declared), args, strict=False)), **kwargs}
        result = card.fake(given, card.check(card.name, given))
        inputs = [given[name] for name in tensors]
        attributes = {name: _attribute(value) for name, value in given.items() if name not in tensors}
        attributes = {name: value for name, value in attributes.items() if value is not None}
        domain = f"{NAMESPACE}::{card.name}"
        if isinstance(result, tuple):
            kinds, shapes = [each.dtype for each in result], [each.shape for each in result]
            return tuple(
                torch.onnx.ops.symbolic_multi_out(domain, inputs, attributes, dtypes=kinds, shapes=shapes, version=1)
            )
        made = torch.onnx.ops.symbolic(domain, inputs, attributes, dtype=result.dtype, shape=result.shape, version=1)
        # The operators that decompose are not traced through, so the order in memory must be stated.
        channels_last = result.dim() == 4 and not result.is_contiguous()
        return made.clone(memory_format=torch.channels_last) if channels_last else made

    return decomposed


def _attribute(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
