"""What derivatives are compared with: the definition of a layer in float64, and the ways to differentiate it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.utils import _pytree as pytree

from tilewright.kernels.activation import apply_activation
from tilewright.nn import ConvLayer, Int8ConvBnAct2d, Int8StaticLinear, QuantizedLinear

Function = Callable[..., torch.Tensor]
#: Relative to the largest derivative: sums of float32.
TOLERANCE = 2e-5
#: The ordinary backward multiplies in the dtype of the gradient.
TOLERANCES = {torch.float32: TOLERANCE, torch.float64: TOLERANCE, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Trees of tensors, the second in float64."""
    ours, theirs = (pytree.tree_leaves(each) for each in (found, expected))
    assert len(ours) == len(theirs) > 0
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape
        assert y.abs().max() > 0, "a derivative that is 0 everywhere would prove nothing"
        assert (x.double() - y).abs().max() <= tolerance * y.abs().max()


def equal_but_for_order(a: torch.Tensor, b: torch.Tensor) -> None:
    """Sums may be taken in another order, for other numbers of rows."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---- the definition
def through(x: torch.Tensor, scale: float, zero: int = 0) -> torch.Tensor:
    """Rounded to int8 with a static scale and zero point, with the derivative 1."""
    return x + ((((x / scale).round() + zero).clamp(-127, 127) - zero) * scale - x).detach()


def linear_definition(layer: QuantizedLinear) -> Function:
    weight = layer.dequantize_weight().double()

    def define(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None) -> torch.Tensor:
        rows = through(x, layer.x_scale) if isinstance(layer, Int8StaticLinear) else x
        y = apply_activation(F.linear(rows, weight, bias), layer.activation)
        return y if residual is None else y + residual

    return define


def conv_definition(layer: ConvLayer) -> Function:
    weight = layer.dequantize_weight().double().permute(0, 3, 1, 2)
    one = layer.origin == "Conv1d"
    options: Any = layer.stride, layer.padding, layer.dilation, layer.groups

    def define(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None) -> torch.Tensor:
        image = through(x, layer.x_scale, layer.x_zero) if isinstance(layer, Int8ConvBnAct2d) else x
        y = F.conv1d(image, weight.squeeze(2), bias, *options) if one else F.conv2d(image, weight, bias, *options)
        y = y if residual is None else y + residual
        return apply_activation(y, layer.activation, negative_slope=layer.negative_slope)

    return define


def function_of(layer: nn.Module) -> Function:
    """Of x, bias and residual."""

    def call(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None) -> torch.Tensor:
        return functional_call(layer, {} if bias is None else {"bias": bias}, (x, residual))

    return call


def bias_of(layer: nn.Module) -> torch.Tensor | None:
    bias = layer._parameters["bias"]
    return None if bias is None else bias.detach()


def arguments_of(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x, the bias if there is one, a residual."""
    y = layer(x)
    bias = bias_of(layer)
    return (x, *([] if bias is None else [bias]), torch.randn_like(y))


def spread(function: Function, layer: nn.Module) -> Function:
    """``function`` of the arguments that ``arguments_of`` gives."""
    if bias_of(layer) is not None:
        return function
    return lambda x, residual: function(x, None, residual)


def both(layer: Any, x: torch.Tensor) -> tuple[Function, Function, tuple[torch.Tensor, ...]]:
    """The layer and its definition, as functions of the same arguments."""
    define = linear_definition(layer) if isinstance(layer, QuantizedLinear) else conv_definition(layer)
    return spread(function_of(layer), layer), spread(define, layer), arguments_of(layer, x)


def doubled(tensors: Any) -> Any:
    return tuple(each.double() for each in tensors)


def tangents_of(arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.randn_like, arguments))


def check_first_order(ours: Function, theirs: Function, arguments: tuple[torch.Tensor, ...]) -> None:
    """Forward and reverse mode by ``torch.func`` and by autograd, several times, and the values."""
    tolerance = TOLERANCES[arguments[0].dtype]
    plain, tangents = ours(*arguments), tangents_of(arguments)
    expected = jvp(theirs, doubled(arguments), doubled(tangents))[1]
    for _ in range(3):
        value, found = jvp(ours, arguments, tangents)
        assert torch.equal(value, plain) and value.dtype == found.dtype == plain.dtype
        close(found, expected, tolerance)
        with torch.no_grad(), forward_ad.dual_level():
            dual = ours(*map(forward_ad.make_dual, arguments, tangents))
            value, tangent = forward_ad.unpack_dual(dual)
            assert torch.equal(value, plain)
            close(tangent, expected, tolerance)
        with torch.no_grad():
            assert torch.equal(ours(*arguments), plain)
    cotangent = torch.randn_like(plain)
    expected = vjp(theirs, *doubled(arguments))[1](cotangent.double())
    value, pull = vjp(ours, *arguments)
    assert torch.equal(value, plain)
    found = pull(cotangent)
    assert all(each.dtype == argument.dtype for each, argument in zip(found, arguments, strict=True))
    close(found, expected, tolerance)
    leaves = [each.clone().requires_grad_() for each in arguments]
    close(torch.autograd.grad(ours(*leaves), leaves, cotangent), expected, tolerance)


def weighted_sum(function: Function) -> Function:
    """Of the results, in float64."""

    def add(*given: torch.Tensor) -> torch.Tensor:
        y = function(*given).double()
        return (y.flatten() * torch.linspace(-1, 2, y.numel(), dtype=torch.float64)).sum()

    return add


def second_derivatives(function: Function, arguments: tuple[torch.Tensor, ...]) -> Iterator[Any]:
    """In the ways that ``torch.func`` has, of a sum: what it is weighted by does not depend on rounded values."""
    numbers = tuple(range(len(arguments)))
    weighted = weighted_sum(function)

    def loss(*given: torch.Tensor) -> torch.Tensor:
        return weighted(*given)

    yield "hessian", hessian(loss, numbers)(*arguments)
    for name, outer, inner in (("rr", jacrev, jacrev), ("ff", jacfwd, jacfwd), ("rf", jacrev, jacfwd)):
        yield name, outer(inner(loss, numbers), numbers)(*arguments)


def check_second_order(ours: Function, theirs: Function, arguments: tuple[torch.Tensor, ...]) -> None:
    expected = next(second_derivatives(theirs, doubled(arguments)))[1]

    def nonzero(tree: Any) -> list[torch.Tensor]:
        """Leaves, but those whose derivative is 0 by definition."""
        leaves, exact = (pytree.tree_leaves(each) for each in (tree, expected))
        for leaf, right in zip(leaves, exact, strict=True):
            assert right.any() or not leaf.any()
        return [leaf for leaf, right in zip(leaves, exact, strict=True) if right.any()]

    for _, found in second_derivatives(ours, arguments):
        close(nonzero(found), nonzero(expected), 5 * TOLERANCE)
    leaves = [each.clone().requires_grad_() for each in arguments]
    direction = tangents_of(arguments)
    slopes = torch.autograd.grad(weighted_sum(ours)(*leaves), leaves, create_graph=True)
    product = sum((slope * each).sum() for slope, each in zip(slopes, direction, strict=True))
    again = torch.autograd.grad(product, leaves, allow_unused=True, materialize_grads=True)
    gradient = grad(weighted_sum(theirs), tuple(range(len(leaves))))
    exact = jvp(gradient, doubled(arguments), doubled(direction))[1]
    for found, right in zip(again, exact, strict=True):
        assert right.any() or not found.any()
    pairs = [pair for pair in zip(again, exact, strict=True) if pair[1].any()]
    close([found for found, _ in pairs], [right for _, right in pairs], 5 * TOLERANCE)
