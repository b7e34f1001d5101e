"""Derivatives of drop-in layers, in every mode and order, are those of the definition: the float function of the stored
weight, with the rounding of activations passed straight through. Values are the plain call's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from tests.contracts.convolutions import Convolution, each_convolution
from tests.contracts.derivatives import (
    Function,
    both,
    check_first_order,
    check_second_order,
    close,
    doubled,
    equal_but_for_order,
    weighted_sum,
)
from tests.contracts.layers import LAYERS, K, Layer, N, each_layer


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


ACTIVATIONS = ("none", "gelu", "silu", "relu")
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS[:3])
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)


# ---- layers
@each_activation
@each_layer
def test_first_derivatives_of_a_linear_layer(layer: Layer, activation: str) -> None:
    ours, theirs, arguments = both(layer.make(activation=activation), torch.randn(2, 3, K))
    check_first_order(ours, theirs, arguments)


@each_dtype
@each_layer
def test_first_derivatives_of_a_linear_layer_of_other_inputs(layer: Layer, dtype: torch.dtype) -> None:
    made = layer.make(activation="gelu")
    x = torch.randn(3, K).to(dtype)
    ours, theirs, arguments = both(made, x)
    check_first_order(ours, theirs, arguments)


@pytest.mark.parametrize("activation", ["none", "relu", "hardswish", "leaky_relu"])
@each_convolution
def test_first_derivatives_of_a_convolution(convolution: Convolution, activation: str) -> None:
    made = convolution.make(activation=activation)
    check_first_order(*both(made, convolution.input()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_convolution
def test_first_derivatives_of_a_convolution_of_16_bits(convolution: Convolution, dtype: torch.dtype) -> None:
    made = convolution.make(dtype, activation="silu")
    check_first_order(*both(made, convolution.input().to(dtype)))


@each_layer
def test_second_derivatives_of_a_linear_layer(layer: Layer) -> None:
    check_second_order(*both(layer.make(16, 8, activation="gelu", **groups(layer)), torch.randn(2, 16)))


def groups(layer: Layer) -> dict[str, Any]:
    """Options for a layer of few columns."""
    return {"group_size": 16} if "int4" in layer.name else {}


@each_convolution
def test_second_derivatives_of_a_convolution(convolution: Convolution) -> None:
    made = convolution.make(activation="silu")
    x = convolution.input(1)[..., :5] if convolution.dims == 1 else convolution.input(1)[..., :4, :3]
    check_second_order(*both(made, x))


# ---- vmap
@each_layer
def test_vmap_of_a_linear_layer(layer: Layer) -> None:
    made = layer.make(activation="silu")
    x, residual = torch.randn(5, 4, K), torch.randn(5, 4, N)
    with torch.no_grad():
        for dim in (0, 1):
            for given in (None, residual):
                found = vmap(made, (dim, None if given is None else dim))(x, given)
                each = [
                    made(x.select(dim, i), None if given is None else given.select(dim, i)) for i in range(len(found))
                ]
                equal_but_for_order(found, torch.stack(each))
        equal_but_for_order(vmap(made, (0, None))(x, residual[0]), torch.stack([made(e, residual[0]) for e in x]))
        equal_but_for_order(vmap(made, (None, 0))(x[0], residual), torch.stack([made(x[0], e) for e in residual]))
        equal_but_for_order(vmap(vmap(made))(x), made(x))


@each_convolution
def test_vmap_of_a_convolution(convolution: Convolution) -> None:
    made = convolution.make(activation="silu")
    x = torch.stack([convolution.input() for _ in range(3)])
    residual = torch.randn(3, *made(x[0]).shape)
    with torch.no_grad():
        equal_but_for_order(vmap(made)(x), torch.stack([made(each) for each in x]))
        equal_but_for_order(vmap(made)(x[0]), made(x[0]))  # of single images
        equal_but_for_order(
            vmap(made)(x, residual), torch.stack([made(*each) for each in zip(x, residual, strict=True)])
        )
        equal_but_for_order(vmap(made, (None, 0))(x[0], residual), torch.stack([made(x[0], each) for each in residual]))


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[2], LAYERS[5]], ids=lambda layer: layer.name)
def test_an_ensemble_of_biases_and_weights(layer: Layer) -> None:
    made = [layer.make() for _ in range(3)]
    held, buffers = torch.func.stack_module_state(made)  # type: ignore[arg-type]
    x = torch.randn(4, K)
    with torch.no_grad():
        found = vmap(lambda p, b: functional_call(made[0], (p, b), (x,)))(held, buffers)
        expected = torch.stack([functional_call(made[0], dict(each.state_dict()), (x,)) for each in made])
    equal_but_for_order(found, expected)


@each_layer
def test_gradients_of_each_sample(layer: Layer) -> None:
    made = layer.make(activation="gelu")
    ours, theirs, (x, *rest) = both(made, torch.randn(3, K))
    numbers = tuple(range(len(rest) + 1))
    dims = (0, *[None] * (len(rest) - 1), 0)

    def of_samples(function: Function, x: torch.Tensor, *rest: torch.Tensor) -> Any:
        return vmap(grad(weighted_sum(function), numbers), dims)(x, *rest)

    close(of_samples(ours, x, *rest), of_samples(theirs, *doubled((x, *rest))))


# ---- what is not finite
def test_values_that_are_not_finite_stay() -> None:
    layer = LAYERS[4].make()
    x = torch.randn(3, K)
    x[1, 2] = torch.inf
    plain = layer(x)
    assert plain[1].isinf().any()
    value, tangent = jvp(layer, (x,), (torch.ones_like(x),))
    assert torch.equal(value.nan_to_num(1), plain.nan_to_num(1))
    assert tangent[[0, 2]].isfinite().all() and tangent[0].any()
