"""Derivatives and ``torch.vmap`` of converted networks, eager and compiled, also where int8 is handed on in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap

import tilewright as tw
from tests.contracts.derivatives import (
    Function,
    bias_of,
    close,
    conv_definition,
    equal_but_for_order,
    linear_definition,
)
from tests.contracts.layers import K
from tilewright.nn import ConvLayer, QuantizedLinear


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ---- networks
class Residual(nn.Module):
    """Convolutions with batch-norm, a pooling and an addition between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.pool = nn.MaxPool2d(2)
        self.third = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.pool(torch.relu(self.second(x) + x))
        return self.head(self.third(x).mean((2, 3)))


def network(recipe: str) -> tuple[nn.Module, torch.Tensor]:
    """A converted network and an input."""
    if recipe in ("fuse", "int8 images"):
        x = torch.randn(2, 3, 8, 8)
        data = {} if recipe == "fuse" else {"calibration_data": [torch.randn(4, 3, 8, 8)]}
        converted = tw.convert_model(Residual().eval(), recipe.split()[0], **data)
        return converted, x
    if recipe == "int8 chain":
        model = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Hardswish()),
            *(nn.Conv2d(8, 8, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
        )
        data = [torch.randn(4, 3, 8, 8)]
        return tw.convert_model(model.eval(), "int8", calibration_data=data), torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Linear(K, 32), nn.LayerNorm(32), nn.Linear(32, 16), nn.SiLU(), nn.Linear(16, 4))
    return tw.convert_model(model.eval(), recipe, fuse=False), torch.randn(3, K)


def by_layers(model: nn.Module) -> Function:
    """The float64 definition of a network of layers that hand floats on."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, (QuantizedLinear, ConvLayer)):
            twin.set_submodule(name, Defined(module))
        vars(module).pop("forward", None)
    return twin.double()


class Defined(nn.Module):
    """A layer's definition in its place."""

    def __init__(self, layer: Any):
        super().__init__()
        self.define = linear_definition(layer) if isinstance(layer, QuantizedLinear) else conv_definition(layer)
        bias = bias_of(layer)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.define(x, self.bias, residual)


RECIPES = ("int8", "int8-weight-only", "int4", "w4a8", "sparse24", "fuse", "int8 images")


@pytest.mark.parametrize("recipe", RECIPES)
def test_derivatives_of_a_network(recipe: str) -> None:
    model, x = network(recipe)
    with torch.no_grad():
        plain = [model(x) for _ in range(3)]
    direction = torch.randn_like(x)
    held = {name: each.detach() for name, each in model.named_parameters()}
    changes = {name: torch.randn_like(each) for name, each in held.items()}
    values, tangent = jvp(lambda p, x: functional_call(model, p, (x,)), (held, x), (changes, direction))
    assert torch.equal(values, plain[-1]) or recipe in ("fuse", "int8 images")  # recordings add in another order
    equal_but_for_order(values, plain[-1])
    pulled = vjp(lambda p, x: functional_call(model, p, (x,)), held, x)[1](torch.ones_like(values))
    reverse = (pulled[1] * direction).sum() + sum((pulled[0][name] * changes[name]).sum() for name in held)
    assert abs(tangent.sum() - reverse) <= 1e-4 * tangent.norm() * values.numel() ** 0.5
    assert all(pulled[0][name].any() for name in held), "every parameter has a part in it"
    leaf = x.clone().requires_grad_()
    result = model(leaf)
    equal_but_for_order(result, plain[-1])
    model.requires_grad_()
    result = model(leaf)
    found = torch.autograd.grad(result.sum(), [leaf, *model.parameters()])
    close(found, [pulled[1].double(), *[each.double() for each in pulled[0].values()]], 1e-4)
    with torch.no_grad(), forward_ad.dual_level():
        dual = model(forward_ad.make_dual(x, direction))
        assert forward_ad.unpack_dual(dual).tangent is not None
        dual_tangent = forward_ad.unpack_dual(dual).tangent.clone()
    close(dual_tangent, jvp(model, (x,), (direction,))[1].double(), 1e-5)
    with torch.no_grad():
        assert torch.equal(model(x), plain[-1])


@pytest.mark.parametrize("recipe", ["fuse", "int8 chain"])
def test_derivatives_of_a_network_are_those_of_its_layers(recipe: str) -> None:
    model, x = network(recipe)
    defined = by_layers(model)
    direction = torch.randn_like(x)
    expected = jvp(defined, (x.double(),), (direction.double(),))[1]
    close(jvp(model, (x,), (direction,))[1], expected, 1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_vmap_of_a_network(recipe: str) -> None:
    model, x = network(recipe)
    batch = torch.stack([x, x.flip(0), 2 * x])
    with torch.no_grad():
        for _ in range(3):
            equal_but_for_order(vmap(model)(batch), torch.stack([model(each) for each in batch]))


def test_second_derivatives_of_a_network_in_int8() -> None:
    model, x = network("int8 images")
    small = x[:1, :, :4, :4]
    rows = hessian(lambda x: model(x).square().sum())(small).reshape(48, 48)
    close(rows, rows.T.double(), 1e-4)


def test_parameters_before_int8_have_their_gradients() -> None:
    model = Residual().eval()
    data = [torch.randn(4, 3, 8, 8)]
    converted = tw.convert_model(model, "int8", exclude=["first.0"], calibration_data=data)
    converted(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(each.grad is not None for each in converted.parameters() if each.requires_grad)


# ---- compiled
class Images(nn.Module):
    """Convolutions that PyTorch can differentiate in every mode when they are compiled: without batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(each, 8, 3, padding=1) for each in (3, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.head(torch.relu(self.second(x) + x).mean((2, 3)))


def compilable(recipe: str) -> tuple[nn.Module, torch.Tensor]:
    if recipe in ("fuse", "int8 images"):
        data = {"calibration_data": [torch.randn(4, 3, 6, 6)]} if recipe == "int8 images" else {}
        return tw.convert_model(Images().eval(), recipe.split()[0], **data), torch.randn(2, 3, 6, 6)
    model = nn.Sequential(nn.Linear(K, 32), nn.SiLU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4))
    return tw.convert_model(model.eval(), recipe), torch.randn(3, K)


def loss_of(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: model(x).square().sum()


def tangent(model: nn.Module, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return jvp(model, (x,), (v,))[1]


def gradient(model: nn.Module, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return grad(loss_of(model))(x)


def product(model: nn.Module, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return jvp(grad(loss_of(model)), (x,), (v,))[1]


def of_samples(model: nn.Module, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return vmap(grad(lambda each: loss_of(model)(each[None])))(x)


def values(model: nn.Module, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return vmap(model)(torch.stack([x, v]))


MODES = (tangent, gradient, product, of_samples, values)
each_mode = pytest.mark.parametrize("mode", MODES, ids=[mode.__name__ for mode in MODES])


def check_compiled(recipe: str, mode: Callable[..., torch.Tensor], backend: str) -> None:
    model, x = compilable(recipe)
    v = torch.randn_like(x)
    expected = mode(model, x, v)
    for with_grad in (True, False):
        torch._dynamo.reset()
        with torch.set_grad_enabled(with_grad):
            found = torch.compile(mode, backend=backend, fullgraph=True)(model, x, v)
        close(found, expected.double(), 1e-5)


@each_mode
@pytest.mark.parametrize("recipe", ["int8", "fuse", "int8 images"])
def test_transformations_inside_of_a_compiled_function(recipe: str, mode: Callable[..., torch.Tensor]) -> None:
    check_compiled(recipe, mode, "aot_eager")


@each_mode
@pytest.mark.parametrize("recipe", ["int8", pytest.param("int8 images", marks=pytest.mark.slow)])
def test_transformations_with_inductor(recipe: str, mode: Callable[..., torch.Tensor]) -> None:
    check_compiled(recipe, mode, "inductor")


@each_mode
@pytest.mark.parametrize("recipe", ["int8", "int8 images"])
def test_transformations_with_our_own_backend(recipe: str, mode: Callable[..., torch.Tensor]) -> None:
    check_compiled(recipe, mode, "tilewright")


@pytest.mark.parametrize("recipe", ["int8", "fuse", "int8 images"])
def test_a_compiled_network_in_a_dual_level(recipe: str) -> None:
    torch._dynamo.reset()
    model, x = compilable(recipe)
    v = torch.randn_like(x)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        plain = [compiled(x) for _ in range(3)][-1]
        with forward_ad.dual_level():
            value, found = (each.clone() for each in forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, v))))
        assert torch.equal(compiled(x), plain)
    equal_but_for_order(value, plain)
    close(found, tangent(model, x, v).double(), 1e-5)


@pytest.mark.parametrize("recipe", ["int8", "fuse", "int8 images"])
def test_the_backward_pass_of_a_compiled_network(recipe: str) -> None:
    torch._dynamo.reset()
    model, x = compilable(recipe)
    leaf = x.clone().requires_grad_()
    compiled = torch.compile(model, backend="aot_eager")
    (found,) = torch.autograd.grad(loss_of(compiled)(leaf), leaf)
    close(found, gradient(model, x, x).double(), 1e-5)
