"""Example inputs of an export: how they may be given, and their batch as a dynamic dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: of one tensor, of a tuple or list, or of a mapping. Raises TypeError."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    raise TypeError(f"example_inputs is a tensor, a tuple or list, or a mapping, not {type(example_inputs).__name__}")


def with_dynamic_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The arguments and their dynamic shapes. A batch of one is doubled: PyTorch takes sizes of one for constants.

    Raises ValueError if the first dimensions of the tensors differ, or are 0.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.dim()]
    sizes = {len(value) for value in tensors}
    if len(sizes) > 1:
        raise ValueError(
            f"the first dimensions of the example inputs differ ({sorted(sizes)}), so they are no batch: "
            "give dynamic_shapes, or dynamic_batch=False"
        )
    if sizes == {0}:
        raise ValueError("the example inputs are an empty batch: give at least one row")
    batch = torch.export.Dim("batch", min=1)

    def prepared(value: Any) -> tuple[Any, Any]:
        if not isinstance(value, torch.Tensor):
            return value, None
        if not value.dim():
            return value, {}
        return torch.cat([value, value]) if len(value) == 1 else value, {0: batch}

    positional = [prepared(value) for value in args]
    named = {name: prepared(value) for name, value in kwargs.items()}
    shapes: Any = tuple(shape for _, shape in positional) if positional else {n: s for n, (_, s) in named.items()}
    return tuple(value for value, _ in positional), {n: value for n, (value, _) in named.items()}, shapes
