"""Hooks whose findings the code of the model picks up: what it answers with is there after the conversion too."""

from __future__ import annotations

import contextvars
import functools
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from tests.convert.networks import SmallResNet, settled

COLLECTED: contextvars.ContextVar[list[torch.Tensor] | None] = contextvars.ContextVar("collected", default=None)
GLOBAL: list[torch.Tensor] = []


class Recorder:
    def __init__(self) -> None:
        self.heard: list[torch.Tensor] = []

    def hear(self, module: nn.Module, args: Any, y: torch.Tensor) -> None:
        self.heard.append(y)


class Asks(SmallResNet):
    """Answers with what a hook on one of its layers has heard."""

    def forward(self, x: torch.Tensor) -> Any:
        heard = self.begin()
        y = super().forward(x)
        return y, tuple(heard)

    def begin(self) -> list[torch.Tensor]:
        raise NotImplementedError


class ByContext(Asks):
    def __init__(self) -> None:
        super().__init__()

        def hear(module: nn.Module, args: Any, y: torch.Tensor) -> None:
            if (heard := COLLECTED.get()) is not None:
                heard.append(y)

        self.layer1.register_forward_hook(hear)

    def forward(self, x: torch.Tensor) -> Any:
        heard: list[torch.Tensor] = []
        token = COLLECTED.set(heard)
        try:
            y = SmallResNet.forward(self, x)
        finally:
            COLLECTED.reset(token)
        return y, tuple(heard)


class ByRecorder(Asks):
    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()
        self.layer1.register_forward_hook(self.recorder.hear)

    def begin(self) -> list[torch.Tensor]:
        self.recorder.heard.clear()
        return self.recorder.heard


class ByListOfTheRecorder(ByRecorder):
    def __init__(self) -> None:
        super().__init__()
        self.heard = self.recorder.heard
        del self.recorder

    def begin(self) -> list[torch.Tensor]:
        self.heard.clear()
        return self.heard


class ByPartial(Asks):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[torch.Tensor] = []
        self.layer1.register_forward_pre_hook(functools.partial(self._hear, self.heard))

    @staticmethod
    def _hear(heard: list[torch.Tensor], module: nn.Module, args: Any) -> None:
        heard.append(args[0])

    def begin(self) -> list[torch.Tensor]:
        self.heard.clear()
        return self.heard


class ByGlobal(Asks):
    def __init__(self) -> None:
        super().__init__()
        self.layer1[0].register_forward_hook(lambda module, args, y: GLOBAL.append(y))

    def begin(self) -> list[torch.Tensor]:
        GLOBAL.clear()
        return GLOBAL


@pytest.mark.parametrize("recipe", ["fuse", "int8"])
@pytest.mark.parametrize("kind", [ByContext, ByRecorder, ByListOfTheRecorder, ByPartial, ByGlobal])
def test_what_hooks_hear_is_in_the_answer(kind: type[nn.Module], recipe: str) -> None:
    model = settled(kind())
    small = tw.convert_model(model, recipe)
    with torch.no_grad():
        for batch in (2, 2, 2, 3):
            x = torch.randn(batch, 1, 16, 16)
            (y, heard), (expected, expected_heard) = small(x), model(x)
            assert len(heard) == len(expected_heard) == 1
            torch.testing.assert_close(y, expected, rtol=1e-1, atol=1e-1)
            torch.testing.assert_close(heard[0], expected_heard[0], rtol=1e-4, atol=1e-4)
    assert "" in tw.report(small).untraced


def test_hooks_that_tell_somebody_else_leave_the_graph_whole() -> None:
    seen: list[torch.Tensor] = []
    model = settled(SmallResNet())
    model.layer1.register_forward_hook(lambda module, args, y: seen.append(y))
    model.layer2.register_forward_hook(Recorder().hear)
    small = tw.convert_model(model, "fuse")
    assert "" not in tw.report(small).untraced and "forward" in vars(small)
    with torch.no_grad():
        small(torch.randn(2, 1, 16, 16))
    assert len(seen) == 1
