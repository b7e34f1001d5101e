"""What the functions see that the code of a network calls: values that say they are tensors, and no random numbers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import is_tensor, nn

import tilewright as tw
from tests.convert.networks import conv_bn, settled


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(4, 4)


def is_a_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def by_a_function(x: Any) -> Any:
    return x if is_a_tensor(x) else torch.zeros(2, 4, 9, 7)


def by_pytorch_s_function(x: Any) -> Any:
    return x if torch.is_tensor(x) else torch.zeros(2, 4, 9, 7)


def by_its_name(x: Any) -> Any:
    return x if is_tensor(x) else torch.zeros(2, 4, 9, 7)


class Asks(Base):
    def __init__(self, ask: Any, where: str) -> None:
        super().__init__()
        self.ask, self.where, self.unread = ask, where, Unread()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.where == "in forward":
            y = x if torch.is_tensor(x) else torch.zeros(2, 4, 9, 7)
        elif self.where == "under a global name":
            y = by_a_function(x)
        else:
            y = self.ask(x)
        return self.unread(self.block(y))


class Unread(nn.Module):
    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    "ask, where",
    [
        (None, "in forward"),
        (None, "under a global name"),
        (by_a_function, "in an attribute"),
        (by_pytorch_s_function, "in an attribute"),
        (by_its_name, "in an attribute"),
    ],
)
def test_code_is_told_that_a_value_is_a_tensor(ask: Any, where: str) -> None:
    """With a part that cannot be read, no proof would tell."""
    model = settled(Asks(ask, where))
    converted = tw.convert_model(model, "fuse")
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 4, 9, 7)
            torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    program = vars(converted)["forward"]
    assert "zeros" not in program.source and program.refused is None


def test_a_function_that_asks_for_random_numbers_is_not_read() -> None:
    model = settled(Rolls())
    assert "random.random" in tw.report(tw.convert_model(model, "fuse")).untraced[""]


def rolled() -> float:
    return random.random()


class Rolls(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) * rolled()


@pytest.mark.filterwarnings("ignore")
def test_traced_and_scripted_parts_are_called_as_they_are() -> None:
    class Mixed(Base):
        def __init__(self) -> None:
            super().__init__()
            self.traced = torch.jit.trace(nn.Conv2d(4, 4, 1), torch.randn(1, 4, 9, 7))
            self.scripted = torch.jit.script(nn.Conv2d(4, 4, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.block(x)
            return self.traced(y) + self.scripted(y)

    model, x = settled(Mixed()), torch.randn(2, 4, 9, 7)
    converted = tw.convert_model(model, "fuse")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
