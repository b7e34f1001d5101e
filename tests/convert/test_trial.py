"""A converted model is called once where there is something to call it on, and layers that raise are given back."""

from __future__ import annotations

import copy
import gc
import queue
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from tests.convert.networks import settled
from tilewright.kernels.dispatch.packed import packed_bytes
from tilewright.nn import ConvBnAct2d, FoldedBatchNorm, FusedActivation, QuantizedLinear

X = torch.randn(4, 64)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


class Particular(nn.Module):
    """Wants a class that a converted layer is not of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(64, 64), Block(), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32 and not isinstance(self.block.up, nn.Linear):
            raise TypeError("block.up is no nn.Linear")
        return self.last(self.block(self.first(x)))


class Reaching(nn.Module):
    """Uses what only a plain layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.odd = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(input=x)
        weight = self.odd._parameters["weight"]
        return y @ weight.t()


def reasons(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.reason or "" for layer in tw.report(model).layers}


@pytest.mark.parametrize("given", ["calibration_data", "example_inputs"])
@torch.no_grad()
def test_a_layer_that_raises_is_given_back(given: str) -> None:
    torch.manual_seed(0)
    model = Particular().eval()
    expected = model(X)
    state = copy.deepcopy(model.state_dict())
    converted = tw.convert_model(model, "int8", **{given: [X, X]})
    assert type(converted.block.up) is nn.Linear and converted.block.up is not model.block.up
    assert converted.block.up.weight is model.block.up.weight
    assert type(converted.block.act) is nn.GELU, "what was fused into it stands for itself again"
    assert all(isinstance(each, QuantizedLinear) for each in (converted.first, converted.block.down, converted.last))
    reason = "the converted model could not be called with it: TypeError: block.up is no nn.Linear"
    assert reasons(converted)["block.up"] == reason and not reasons(converted)["block.down"]
    torch.testing.assert_close(converted(X), expected, rtol=0.05, atol=0.02)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_without_inputs_nothing_is_called() -> None:
    model = tw.convert_model(Particular().eval(), "int8")
    assert isinstance(model.block.up, QuantizedLinear) and isinstance(model.block.act, FusedActivation)
    with pytest.raises(TypeError, match="no nn.Linear"):
        model(X)


@torch.no_grad()
def test_in_place_it_gets_the_rounded_weight_and_the_report_says_so() -> None:
    model = Particular().eval()
    weight = model.block.up.weight.detach().clone()
    converted = tw.convert_model(model, "int8", example_inputs=X, inplace=True)
    assert converted is model and type(model.block.up) is nn.Linear
    torch.testing.assert_close(model.block.up.weight, weight, rtol=0, atol=0.01)
    assert not torch.equal(model.block.up.weight, weight)
    assert reasons(model)["block.up"].endswith("inplace=True had freed its weight, so it has the rounded one")
    model(X)


@torch.no_grad()
def test_the_layer_that_the_line_names_is_the_one() -> None:
    model = Reaching().eval()
    converted = tw.convert_model(model, "int8", example_inputs=X)
    assert type(converted.odd) is nn.Linear and isinstance(converted.first, QuantizedLinear)
    assert reasons(converted)["odd"].endswith("KeyError: 'weight'")
    assert converted(X).shape == (4, 64)


class Convolutional(nn.Module):
    """Reaches past its convolution's forward where it is called with more than it traces with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.conv, self.other = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor, directly: bool = False) -> torch.Tensor:
        if directly:
            y = self.stem._conv_forward(x, self.stem.weight, self.stem.bias)
        else:
            y = self.stem(x)
        return self.other(self.conv(self.act(self.norm(y))))


@pytest.mark.parametrize("recipe", ["fuse", "int8"])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@torch.no_grad()
def test_a_convolution_is_given_back_with_its_batch_norm(recipe: str, inplace: bool) -> None:
    torch.manual_seed(0)
    model, x = settled(Convolutional()), torch.randn(2, 3, 12, 12)
    plain, expected = copy.deepcopy(model), model(x)
    inputs: list[Any] = [{"x": x, "directly": True}]
    data = [x] if recipe == "int8" else None
    converted = tw.convert_model(model, recipe, calibration_data=data, example_inputs=inputs, inplace=inplace)
    assert type(converted.stem) is nn.Conv2d and isinstance(converted.conv, tw.nn.ConvLayer)
    assert type(converted.norm) is (nn.Identity if inplace else nn.BatchNorm2d)
    assert isinstance(converted.other, FoldedBatchNorm) and isinstance(converted.conv, tw.nn.ConvLayer)
    assert isinstance(converted.conv, ConvBnAct2d) == (recipe == "fuse")
    assert "no attribute '_conv_forward'" in reasons(converted)["stem"]
    for arguments in ({}, {"directly": True}):
        for _ in range(3):
            found = converted(x, **arguments)
            torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 if recipe == "int8" else 1e-4)
    assert torch.equal(plain(x), expected)


@torch.no_grad()
def test_where_nothing_is_left_the_conversion_says_why() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if type(self.fc) is not nn.Linear:
                raise RuntimeError("not this class")
            return self.fc(x)

    with pytest.raises(
        ValueError, match="every layer is left alone:\n.*could not be called with it.*not this class: 'fc'"
    ):
        tw.convert_model(Strict().eval(), "int8", example_inputs=X)


@torch.no_grad()
def test_an_error_that_no_layer_explains_is_raised() -> None:
    calls: queue.SimpleQueue[int] = queue.SimpleQueue()  # no state that the converter would put back

    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.put(1)
            if calls.qsize() > 1:
                raise RuntimeError("I am spent")
            return self.fc(x)

    with pytest.raises(RuntimeError, match="cannot be called: RuntimeError: I am spent"):
        tw.convert_model(Once().eval(), "int8", calibration_data=[X])


@torch.no_grad()
def test_the_call_leaves_no_weights_behind() -> None:
    gc.collect()  # models of other tests that lie in cycles
    before = packed_bytes()
    model = tw.convert_model(Block().eval(), "int8", example_inputs=X)
    assert packed_bytes() == before
    assert not [name for module in model.modules() for name in vars(module) if name == "_known_calls"]


def test_a_conversion_leaves_the_garbage_collector_as_it_is() -> None:
    """It is the whole process's."""
    before, seen = (gc.get_freeze_count(), gc.isenabled(), gc.get_threshold()), []
    model = nn.Sequential(nn.Linear(64, 64))
    model.register_forward_hook(lambda *given: seen.append((gc.get_freeze_count(), gc.isenabled(), gc.get_threshold())))
    tw.convert_model(model, calibration_data=[X])
    assert set(seen) == {before}
