"""Tensors whose memory does not hold their values: PyTorch leaves a sign, or zeros, to the next operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.contracts.convolutions import Convolution, each_convolution
from tests.contracts.layers import K, Layer, N, each_layer
from tests.convert.networks import SmallResNet, settled
from tilewright.convert import convert_model
from tilewright.kernels.attention import call
from tilewright.kernels.cpu.replay import Replays
from tilewright.kernels.dispatch.same import holds_values


def negated(x: torch.Tensor) -> torch.Tensor:
    """-x, of which the memory holds x, with steps of one as kernels like them."""
    lazy = torch._neg_view(x)
    assert lazy.is_neg() and not holds_values(lazy)
    return lazy


def conjugated(x: torch.Tensor) -> torch.Tensor:
    """-x as people come by it."""
    lazy = torch.complex(torch.zeros_like(x), x).conj().imag
    assert lazy.is_neg() and not holds_values(lazy)
    return lazy


def zeros(x: torch.Tensor) -> torch.Tensor:
    """Zeros that have no memory, as derivatives of what an input does not reach are."""
    lazy = torch._efficientzerotensor(x.shape, dtype=x.dtype)
    assert not holds_values(lazy)
    return lazy


LAZY = pytest.mark.parametrize("lazy", [negated, conjugated, zeros])


def check(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    """Each call gives what a tensor that holds the same values gives: calls are prepared at the second."""
    plain = x.clone()
    assert holds_values(plain)
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(function(x), function(plain))


@LAZY
@each_layer
def test_inputs_of_linear_layers(layer: Layer, lazy: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    check(layer.make(), lazy(torch.randn(4, K)))


@LAZY
@each_convolution
def test_inputs_of_convolutions(convolution: Convolution, lazy: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    check(convolution.make().eval(), lazy(convolution.input()))


@LAZY
@each_layer
def test_residuals(layer: Layer, lazy: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    module, x = layer.make(), torch.randn(4, K)
    check(lambda residual: module(x, residual=residual), lazy(torch.randn(4, N)))


@each_layer
def test_biases(layer: Layer) -> None:
    torch.manual_seed(0)
    module, x = layer.make(), torch.randn(4, K)
    if module.bias is None:
        pytest.skip("no bias")
    bias = module.bias.detach().clone()
    with torch.inference_mode(False), torch.no_grad():
        module.bias = nn.Parameter(-bias)
        expected = module(x)
        module.bias = nn.Parameter(negated(bias))
        assert module.bias.is_neg()
        for _ in range(3):
            torch.testing.assert_close(module(x), expected)


@LAZY
@pytest.mark.parametrize("recipe", ["fuse", "int8"])
def test_inputs_of_a_program(recipe: str, lazy: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 1, 32, 32)
    check(convert_model(settled(SmallResNet()), recipe, calibration_data=[images]), lazy(images))


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.ops.tilewright.conv2d_fused(x, weight, bias, None, [1, 1], [1, 1, 1, 1])


@LAZY
def test_inputs_of_a_recording(lazy: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 9, 9), torch.randn(8, 3, 3, 3), torch.randn(8)
    fast = Replays(lambda images: convolve(images, weight, bias))
    check(fast, lazy(x))
    assert len(fast.replays) == 1


@LAZY
@pytest.mark.parametrize("number", range(3))
def test_attention_is_left_to_pytorch(lazy: Callable[[torch.Tensor], torch.Tensor], number: int) -> None:
    given = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    with torch.inference_mode():
        assert call.supports(*given, None, False)
        given[number] = lazy(given[number])
        assert not call.supports(*given, None, False)
