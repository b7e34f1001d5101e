"""Random networks that write in place, alias and keep state answer as in PyTorch, call after call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from tests.convert.programs import network
from tilewright.convert.network.program import remove_programs


def states(model: nn.Module) -> list[Any]:
    """What the parts of a random network have counted and kept."""
    found: list[Any] = []
    for part in model.modules():
        if hasattr(part, "history"):
            found += [*part.buffers(recurse=False), part.count, len(part.history), dict(part.options)]
    return found


def same_state(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.allclose(x, y, 1e-3, 1e-4, True) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def close(found: torch.Tensor, expected: torch.Tensor, within: float) -> bool:
    size = expected.abs().max().item() + 1e-3
    return torch.allclose(found / size, expected / size, 0, within, True)


def pictures() -> list[torch.Tensor]:
    """Inputs of five calls: of one shape, then of another."""
    return [torch.randn(shape) for shape in (*[(2, 8, 6, 6)] * 4, (3, 8, 7, 5))]


@pytest.mark.parametrize("seed", range(60))
def test_fused(seed: int) -> None:
    torch.manual_seed(seed)
    model = network(seed)
    plain, before = copy.deepcopy(model), copy.deepcopy(states(model))
    fused = tw.convert_model(model, "fuse")
    assert same_state(states(model), before) and same_state(states(fused), before)
    with torch.no_grad():
        for x in pictures():
            ours, theirs = x.clone(), x.clone()
            expected, found = plain(theirs), fused(ours)
            assert close(found, expected, 1e-3), model.source
            assert close(ours, theirs, 1e-3), model.source
            assert same_state(states(fused), states(plain)), model.source
    assert same_state(states(model), before)


@pytest.mark.parametrize("seed", range(100, 125))
def test_int8(seed: int) -> None:
    """Beside its own layers: random networks amplify what int8 rounds."""
    torch.manual_seed(seed)
    model, data = network(seed), [torch.randn(4, 8, 6, 6) for _ in range(2)]
    kept, before = copy.deepcopy(data), copy.deepcopy(states(model))
    small = tw.convert_model(model, "int8", calibration_data=data)
    assert same_state(states(model), before) and same_state(states(small), before)
    assert all(map(torch.equal, data, kept))
    plain, layers = copy.deepcopy(model), copy.deepcopy(small)
    remove_programs(layers)
    with torch.no_grad():
        for x in pictures():
            expected, found, one_by_one = plain(x.clone()), small(x.clone()), layers(x.clone())
            size = expected.abs().max().item() + 1e-3
            error, of_layers = ((y - expected).abs().max().item() / size for y in (found, one_by_one))
            assert not error > 3 * of_layers + 0.05, model.source
    assert same_state(states(model), before)
