"""Hooks on modules inside of a network that runs as a program: they are heard, and the rest still runs in C."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from tests.convert.networks import SmallResNet, programs_of, settled
from tilewright.convert.network.around_hooks import AroundHooks
from tilewright.kernels.cpu import steps
from tilewright.kernels.cpu.replay import Replays

pytestmark = pytest.mark.skipif(steps.why_no_kernels() is not None, reason=str(steps.why_no_kernels()))
INSIDE = ["conv1", "bn1", "layer1.0", "layer1.0.conv2", "layer1.0.bn2", "layer2.0.downsample", "fc"]


class StopHere(Exception):
    """Raised by a hook that has heard enough."""


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 1, 16, 16)


def network(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    data = {"calibration_data": [image(8)]} if recipe == "int8" else {}
    return tw.convert_model(settled(SmallResNet()), recipe, **data)


@pytest.fixture(params=["fuse", "int8"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return network(request.param)


def by_layers(model: nn.Module, x: torch.Tensor) -> Any:
    with torch.no_grad():
        return type(model).forward(model, x.clone())


def surroundings(model: nn.Module) -> list[AroundHooks]:
    known = programs_of(model)[""]._around._known
    return [each for each in known.values() if isinstance(each, AroundHooks)]


def recorded(around: AroundHooks) -> int:
    return sum(bool(each.replays) for each in around.recorded if isinstance(each, Replays))


def run(model: nn.Module, x: torch.Tensor, times: int = 5) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(x.clone()).clone() for _ in range(times)]


def close(model: nn.Module, found: torch.Tensor, expected: torch.Tensor) -> None:
    """int8 that is handed on is rounded once more than by layers, and ends where calibration data did."""
    tolerance = 0.05 if any(isinstance(part, tw.nn.Int8ConvBnAct2d) for part in model.modules()) else 1e-4
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("inside", INSIDE)
def test_a_watched_module_is_called_and_the_rest_is_recorded(model: nn.Module, inside: str) -> None:
    x = image()
    run(model, x)
    heard: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = model.get_submodule(inside).register_forward_hook(
        lambda module, args, y: heard.append((args[0].clone(), y.clone()))
    )
    results = run(model, x)
    assert len(heard) == 5, "once in each call"
    (around,) = surroundings(model)
    assert recorded(around)
    run(model, x, 1)
    expected = by_layers(model, x)
    for y in results:
        close(model, y, expected)
    for found, known in zip(heard[4], heard[6], strict=True):
        close(model, found, known)
    handle.remove()
    assert torch.equal(run(model, x)[4], run(model, x)[4])
    assert len(heard) == 7


def test_what_hooks_make_of_values_goes_on(model: nn.Module) -> None:
    x = image()
    block, conv = model.layer1[0], model.layer2[0].conv1
    block.register_forward_hook(lambda module, args, y: y * 0.8)
    conv.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    block.conv1.register_forward_hook(lambda module, args, y: y.mul_(0.5))
    results = run(model, x)
    assert recorded(surroundings(model)[0])
    close(model, results[4], by_layers(model, x))


def test_a_hook_that_raises_is_called_once_and_heard_by_the_caller(model: nn.Module) -> None:
    x, calls = image(), []

    def stop(module: nn.Module, args: Any, y: torch.Tensor) -> None:
        calls.append(y.shape)
        raise StopHere

    run(model, x)
    handle = model.layer1[0].register_forward_hook(stop)
    for number in range(1, 6):
        with torch.inference_mode(), pytest.raises(StopHere):
            model(x)
        assert len(calls) == number
    handle.remove()
    close(model, run(model, x)[-1], by_layers(model, x))


def test_a_hook_that_removes_itself_and_other_hooks(model: nn.Module) -> None:
    x = image()
    heard: list[int] = []

    def hear(*_: Any) -> None:
        heard.append(1)
        handle.remove()

    run(model, x)
    for number in range(1, 13):  # more than the sets that are remembered
        handle = model.fc.register_forward_hook(hear)
        close(model, run(model, x, 3)[-1], by_layers(model, x))
        assert len(heard) == number
    assert not surroundings(model), "nobody looked more than twice"


def test_weights_and_shapes_may_change_under_a_hook(model: nn.Module) -> None:
    model.layer1[0].register_forward_hook(lambda module, args, y: None)
    run(model, image())
    for batch in (1, 3, 2):
        x = image(batch)
        with torch.no_grad():
            model.fc.weight.mul_(-1.5) if isinstance(model.fc, nn.Linear) else model.fc.bias.add_(1)
        for y in run(model, x):
            close(model, y, by_layers(model, x))
    assert recorded(surroundings(model)[0])
    model.layer2 = nn.Identity()
    with pytest.raises((RuntimeError, ValueError)), torch.inference_mode():
        model(image())


def test_gradients_pass_under_a_hook() -> None:
    model = network("fuse")
    model.layer1[0].register_forward_hook(lambda module, args, y: None)
    run(model, image())
    x = image().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_hooks_on_every_module_hear_of_all(model: nn.Module) -> None:
    x, heard = image(), []
    run(model, x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: heard.append(module))
    try:
        run(model, x, 1)
    finally:
        handle.remove()
    assert {model.conv1, model.layer1[0], model.layer2[0].bn1, model.fc} <= set(heard)
    heard.clear()
    run(model, x)
    assert not heard
