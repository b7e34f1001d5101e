"""Modules that lie in a list or an object as well as under a name: what code finds there is what was converted."""

from __future__ import annotations

import collections
import copy
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
from tests.convert.networks import settled
from tilewright.nn import Int8Linear


class Holder:
    def __init__(self, inner: Any) -> None:
        self.inner = inner


HOLD: dict[str, tuple[Callable[[list[nn.Module]], Any], Callable[[Any], Any]]] = {
    "list": (lambda parts: parts, lambda held: held),
    "tuple": (tuple, lambda held: held),
    "deque": (collections.deque, lambda held: held),
    "dict": (lambda parts: dict(enumerate(parts)), lambda held: held.values()),
    "object": (Holder, lambda held: held.inner),
    "nested": (lambda parts: {"all": (Holder(tuple(parts)),)}, lambda held: held["all"][0].inner),
    "namespace": (lambda parts: types.SimpleNamespace(parts=parts), lambda held: held.parts),
}


class Beside(nn.Module):
    """As in MaskFormer: the layers are registered, but called from where they lie beside."""

    def __init__(self, way: str) -> None:
        super().__init__()
        parts = [nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)]
        self.way, self.held = way, HOLD[way][0](parts)
        for number, part in enumerate(parts):
            self.add_module(str(number), part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in HOLD[self.way][1](self.held):
            x = part(x)
        return x

    def beside(self) -> list[nn.Module]:
        return list(HOLD[self.way][1](self.held))


@pytest.mark.parametrize("way", HOLD)
@pytest.mark.parametrize("inplace", [False, True])
def test_linear_layers(way: str, inplace: bool, tmp_path: Path) -> None:
    model, x = Beside(way).eval(), torch.randn(5, 16)
    with torch.no_grad():
        expected = model(x)
        small = tw.convert_model(copy.deepcopy(model) if inplace else model, "int8", inplace=inplace)
        if not inplace:
            assert torch.equal(model(x), expected) and type(model.beside()[0]) is nn.Linear
        assert small.beside() == list(small.children()) and isinstance(small.beside()[0], Int8Linear)
        y = small(x)
        assert 0 < (y - expected).norm() < 0.05 * expected.norm()
        tw.save_model(small, tmp_path)
        loaded = tw.load_model(tmp_path, lambda: Beside(way))
        assert torch.equal(loaded(x), y) and torch.equal(copy.deepcopy(small)(x), y)
        reverted = tw.revert_model(small)
        assert reverted.beside() == list(reverted.children()) and type(reverted.beside()[0]) is nn.Linear
        torch.testing.assert_close(reverted(x), y, rtol=0.05, atol=0.05)
        assert torch.equal(small(x), y)


class ConvolutionsBeside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1)]
        for number, layer in enumerate(self.layers):
            self.add_module(str(number), layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.relu(x)


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("recipe", ["fuse", "int8"])
def test_convolutions(recipe: str, readable: bool, tmp_path: Path) -> None:
    class Unreadable(ConvolutionsBeside):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.isnan().any() else super().forward(x)

    kind, x = ConvolutionsBeside if readable else Unreadable, torch.randn(2, 3, 9, 9)
    model = settled(kind())
    small = tw.convert_model(model, recipe, calibration_data=[x] if recipe == "int8" else None)
    tw.save_model(small, tmp_path)
    loaded = tw.load_model(tmp_path, kind)
    assert small.layers == list(small.children()) and loaded.layers == list(loaded.children())
    with torch.no_grad():
        expected = model(x)
        for _ in range(3):
            for each in (small, loaded):
                assert (each(x) - expected).norm() < (1e-5 if recipe == "fuse" else 0.05) * expected.norm()
