"""Where integers are multiplied, a sample's results do not depend on its batch, bit for bit: whatever the activation,
and where results do not fill a vector.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tilewright.kernels.activation import ACTIVATIONS, CONV_ACTIVATIONS, apply_activation
from tilewright.kernels.cpu import native
from tilewright.nn import Int8ActInt4WeightLinear, Int8ConvBnAct2d, Int8Linear, Int8StaticLinear, QuantizedLinear

pytestmark = pytest.mark.skipif(native.why_no_native() is not None, reason="PyTorch's own activations depend on it")
WIDTHS = (1, 7, 33, 64)
PARTS = ((0, 1), (1, 2), (3, 8), (5, 22), (36, 37))


def linear_layer(cls: type[QuantizedLinear], width: int, activation: str) -> QuantizedLinear:
    options = {"input_scale": 0.03} if cls is Int8StaticLinear else {}
    return cls.from_float(nn.Linear(48, width), activation=activation, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("cls", [Int8Linear, Int8StaticLinear, Int8ActInt4WeightLinear], ids=lambda cls: cls.__name__)
@torch.no_grad()
def test_rows(cls: type[QuantizedLinear], activation: str) -> None:
    for width in WIDTHS:
        layer = linear_layer(cls, width, activation)
        for dtype in (torch.float32, torch.bfloat16):
            x, residual = (torch.randn(37, 48) * 3).to(dtype), torch.randn(37, width).to(dtype)
            whole = layer(x, residual)
            for begin, end in PARTS:
                assert torch.equal(layer(x[begin:end], residual[begin:end]), whole[begin:end]), (width, begin, end)


@pytest.mark.parametrize("activation", CONV_ACTIVATIONS)
@torch.no_grad()
def test_images(activation: str) -> None:
    for width in WIDTHS:
        conv = nn.Conv2d(5, width, 3, padding=1)
        layer = Int8ConvBnAct2d.from_float(conv, input_scale=0.03, activation=activation)
        x = torch.randn(37, 5, 3, 3)
        whole = layer(x)
        for begin, end in PARTS:
            assert torch.equal(layer(x[begin:end]), whole[begin:end]), (width, begin, end)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_number_by_itself(activation: str) -> None:
    """Nor on how threads share the numbers, nor on what else is there; NaN stays."""
    if activation not in native.ACTIVATIONS:
        pytest.skip(f"the C kernels have no {activation}")
    x = torch.cat([torch.linspace(-12, 12, 40_001), torch.tensor([torch.nan, torch.inf, -0.0])])
    whole = x.clone()
    assert native.activate(whole, activation)
    expected = apply_activation(x.double(), activation)
    torch.testing.assert_close(whole.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    for begin in (0, 1, 39_990):
        for count in (1, 3, 17, 1024, 1025):
            part = x[begin : begin + count].clone()
            assert native.activate(part, activation)
            assert torch.equal(part.nan_to_num(7.0), whole[begin : begin + count].nan_to_num(7.0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = x.clone()
        native.activate(alone, activation)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone.nan_to_num(7.0), whole.nan_to_num(7.0))
