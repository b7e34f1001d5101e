"""Subclasses of PyTorch's layers: converted where they compute the plain product, else left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilewright.convert import convert_model
from tilewright.convert.plain_forward import computes_as


class Transposed(nn.Linear):
    """As Falcon's linear layers are written."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Contiguous(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.contiguous())


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * F.linear(x, self.weight, self.bias)


class Scaled(nn.Linear):
    scale = 1.0  # equal now, and who knows later

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) * self.scale


class Counting(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class Dropping(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


class Gated(nn.Linear):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x)
        return y if gate is None else y * gate


class Clamped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-1, 1))


class PlainConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class HalvedConv(nn.Conv1d):
    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(input, weight / 2, bias)


class NamedConv(nn.Conv1d):
    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(input, weight, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kind, plain",
    [
        (Transposed, True),
        (Contiguous, True),
        (Doubled, False),
        (Scaled, False),
        (Counting, False),
        (Dropping, False),
        (Gated, False),
        (Clamped, False),
    ],
)
def test_linear_layers(kind: Any, plain: bool, bias: bool) -> None:
    layer = kind(40, 24, bias=bias).eval()
    nn.init.zeros_(layer.weight)  # what it computes does not depend on what it holds
    before = dict(vars(layer)), layer.weight.clone(), torch.get_rng_state()
    assert computes_as(layer, nn.Linear) is plain
    assert dict(vars(layer)) == before[0] and torch.equal(layer.weight, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind, plain", [(PlainConv, True), (Standardised, False)])
def test_images(kind: Any, plain: bool, device: str) -> None:
    assert computes_as(kind(8, 12, 3, stride=2, padding=1, dilation=2, groups=4, device=device), nn.Conv2d) is plain


@pytest.mark.parametrize("kind, plain", [(NamedConv, True), (HalvedConv, False)])
def test_sequences(kind: Any, plain: bool) -> None:
    assert computes_as(kind(8, 12, 5, padding=2, bias=False), nn.Conv1d) is plain


@pytest.mark.parametrize("recipe", ["int8", "int4", "int8-weight-only"])
def test_a_subclass_that_computes_the_product_is_converted(recipe: str) -> None:
    torch.manual_seed(0)
    model, plain = nn.Sequential(Transposed(64, 48)).eval(), nn.Sequential(nn.Linear(64, 48)).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, 64)
    assert torch.equal(convert_model(model, recipe)(x), convert_model(plain, recipe)(x))


def test_a_convolution_that_computes_the_plain_one_is_fused() -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(PlainConv(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval(),
        torch.randn(2, 3, 9, 9),
    )
    converted = convert_model(model, "fuse")
    assert type(converted[0]).__name__ == "ConvBnAct2d"
    torch.testing.assert_close(converted(x), model(x))
