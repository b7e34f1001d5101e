"""Every drop-in layer whose ``weight`` reads and writes as that of the layer that was there, and what it should be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

from tests.contracts.convolutions import CONVOLUTIONS
from tests.contracts.layers import LAYERS, K, N
from tilewright.nn import Int8Linear
from tilewright.nn.weight_holder import WeightHolder

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


def conv1d_origin(**options: Any) -> WeightHolder:
    """As of transformers' ``Conv1D``, whose weight is [in, out]."""
    layer = Int8Linear.from_float(nn.Linear(K, N), **options)
    layer.origin = "Conv1D"
    return layer


MAKE: dict[str, Callable[[], Any]] = {
    **{layer.name: layer.make for layer in LAYERS},
    **{f"{layer.name}-bfloat16": lambda layer=layer: layer.make(dtype=torch.bfloat16) for layer in LAYERS[::4]},
    "int8-transposed": conv1d_origin,
    **{f"conv-{each.name}": each.make for each in CONVOLUTIONS},
}
each_layer = pytest.mark.parametrize("name", MAKE)


def made(name: str) -> Any:
    torch.manual_seed(0)
    layer = MAKE[name]().eval()
    layer.layer_name = "fc"
    return layer


def plain_weight(layer: Any) -> torch.Tensor:
    """What ``layer.weight`` should be, by another way."""
    weight: torch.Tensor = layer.to_float().weight.detach()
    return weight.t().contiguous() if layer.origin == "Conv1D" else weight


def input_of(layer: Any) -> torch.Tensor:
    if not hasattr(layer, "kernel_size"):
        return torch.randn(3, layer.in_features, dtype=layer.dtype)
    size = (7, 5) if len(layer.kernel_size) == 2 else (11,)
    return torch.randn(2, layer.in_channels, *size)


def stored(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def rounding(layer: Any) -> float:
    """The largest relative error that the format explains."""
    kind = type(layer).__name__
    if kind in ("ConvBnAct2d", "Sparse24ConvBnAct2d"):
        return 1e-6
    return 0.15 if "Int4" in kind else 0.01


def assert_stores(layer: Any, target: torch.Tensor) -> None:
    """The layer's weight is ``target`` but for the rounding of its format."""
    error, norm = (layer.weight - target).norm(), target.norm()
    assert error <= rounding(layer) * norm, f"off by {error} of {norm}"


def assert_computes_what_it_stores(layer: Any, x: torch.Tensor) -> None:
    """Nothing is remembered of the weight before."""
    for _ in range(3):
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))
