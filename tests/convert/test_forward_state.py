"""State that a network writes in its forward keeps changing call after call, and a conversion changes none of it."""

from __future__ import annotations

import collections
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
from tests.convert.networks import settled
from tilewright.convert import calibrate
from tilewright.convert.state import HeldState, private_copy

LOG: list[int] = []
TOTAL = 0


class Stateful(nn.Module):
    """A convolution, a batch-norm, and a linear layer whose result ``after`` changes."""

    share = 0

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 64)
        self.register_buffer("calls", torch.zeros(()))
        self.tensor, self.number, self.items, self.options = torch.zeros(()), 0, [], {"n": 0}
        self.counter: collections.Counter[str] = collections.Counter()
        self.last: Any = None

    def after(self, y: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3))))


class Buffer(Stateful):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return y * self.calls


class Reassigned(Stateful):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return y * self.calls


class ByMethod(Stateful):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        self.calls.mul_(0.9).add_(1)
        return y * self.calls


class ByData(Stateful):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        self.calls.data.add_(1)
        return y * self.calls


class PlainTensor(Stateful):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        self.tensor += 1
        return y * self.tensor


class Number(Stateful):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        self.number += 1
        return y * self.number


class Appended(Stateful):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        self.items.append(1)
        return y * len(self.items)


class Item(Stateful):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        self.options["n"] += 1
        return y * self.options["n"]


class Counted(Stateful):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        self.counter.update(["call"])
        return y * self.counter["call"]


class Remembered(Stateful):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        z = y if self.last is None else y + self.last
        self.last = y
        return z


class OfTheClass(Stateful):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        type(self).share += 1
        return y * self.share


class Outside(Stateful):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        LOG.append(1)
        return y * len(LOG)


class Global(Stateful):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        global TOTAL
        TOTAL += 1
        return y * TOTAL


class Statistics(nn.Module):
    """A part that keeps a running mean, in a network that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.lerp_(x.mean((0, 2, 3)), 0.1)
        return x - self.mean[:, None, None]


class WithAPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.part, self.last = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            Statistics(),
            nn.Conv2d(8, 8, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.last(self.part(F.relu(self.bn(self.conv(x))))))


KINDS = {
    Buffer: "its buffer|'calls', which",
    Reassigned: "its buffer 'calls'",
    ByMethod: "'calls', which the module holds",
    ByData: "'calls', which the module holds",
    PlainTensor: "'tensor'",
    Number: "its attribute 'number'",
    Appended: "into its attribute 'items'",
    Item: "into its attribute 'options'",
    Counted: "its attribute 'counter'",
    Remembered: "its attribute 'last'",
    OfTheClass: "'share' of the class",
    Outside: "outside of the module",
    Global: "the global 'TOTAL'",
}


@pytest.fixture(autouse=True)
def _from_zero() -> Any:
    global TOTAL
    LOG.clear()
    TOTAL = OfTheClass.share = 0


def picture(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 9, 9)


def held(model: nn.Module) -> list[Any]:
    """All that a network holds, to be compared."""
    values: list[Any] = []
    for module in model.modules():
        values.append(module.training)
        for name, value in sorted({**vars(module), **module._buffers, **module._parameters}.items()):
            if isinstance(value, torch.Tensor):
                values.append((name, value.clone()))
            elif (
                isinstance(value, (int, list, dict))
                and "hooks" not in name
                and name not in ("_modules", "_parameters", "_buffers")
            ):
                values.append((name, repr(value)))
    return values


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x[1], y[1]) if isinstance(x, tuple) and isinstance(x[1], torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("recipe", ["fuse", "int8", "int8 with data"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_state_goes_on_and_the_original_stays(kind: type[Stateful], recipe: str) -> None:
    model = settled(kind())
    model.fc.train()  # a flag of its own, which must come back
    before, numbers = held(model), torch.get_rng_state()
    data = [picture(4), picture(4)] if "data" in recipe else None
    if data:
        numbers = torch.get_rng_state()
    converted = tw.convert_model(model, recipe.split()[0], calibration_data=data)
    assert same(held(model), before) and torch.equal(torch.get_rng_state(), numbers)
    assert TOTAL == OfTheClass.share == len(LOG) == 0
    x, factors, base = picture(), [], None
    with torch.no_grad():
        for _ in range(4):
            y = converted(x)
            base = y if base is None else base
            factors.append(round(float((y * base).sum() / (base * base).sum()), 2))
    assert factors == {ByMethod: [1, 1.9, 2.71, 3.44], Remembered: [1, 2, 2, 2]}.get(kind, [1, 2, 3, 4])
    assert same(held(model), before), "nor does the converted network write to it"
    if recipe != "int8":
        reason = tw.report(converted).untraced[""]
        assert reason.startswith("forward writes ") and any(part in reason for part in KINDS[kind].split("|"))


@pytest.mark.parametrize("recipe", ["fuse", "int8"])
def test_a_part_with_state_leaves_the_rest_a_program(recipe: str) -> None:
    model, twin = settled(WithAPart()), settled(WithAPart())
    twin.load_state_dict(model.state_dict())
    converted = tw.convert_model(model, recipe, calibration_data=[picture(8)] if recipe == "int8" else None)
    assert list(tw.report(converted).untraced) in ([], ["part"]) and "forward" in vars(converted)
    with torch.no_grad():
        for _ in range(4):
            x = picture()
            expected, found = twin(x), converted(x)
            # The statistics take values out of the range that was calibrated: int8 clips them.
            assert (found - expected).norm() < (1e-4 if recipe == "fuse" else 0.1) * expected.norm()
            assert (converted.part.mean - twin.part.mean).norm() < 0.05 * twin.part.mean.norm()
    assert (model.part.mean == 0).all()


def test_random_numbers_of_a_calibrated_network_are_drawn_again() -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 0.01 * torch.randn(())

    torch.manual_seed(3)
    model = Noisy(nn.Linear(64, 64)).eval()
    expected = torch.randn(3)
    torch.manual_seed(3)
    model = Noisy(nn.Linear(64, 64)).eval()
    data = [torch.ones(4, 64)] * 3
    tw.convert_model(model, "int8", calibration_data=data)
    assert torch.equal(torch.randn(3), expected)


def test_python_s_and_pytorch_s_generators_stay_where_they_are() -> None:
    model = settled(Buffer())
    state, numbers = random.getstate(), torch.get_rng_state()
    tw.convert_model(model, "fuse")
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), numbers)


# ---- the parts
def test_held_state_is_put_back_whatever_was_written() -> None:
    model = settled(Buffer())
    model.items, model.options, model.weird = [1, [2]], {"a": {"b": 1}}, torch.tensor([float("nan"), 1.0])
    before, state = held(model), HeldState(model)
    assert not state.changed()
    with torch.no_grad():
        model.calls.add_(1)
        model.calls = torch.ones(3)
        model.tensor.data = torch.ones(2)
        model.weird.data[1] = 5
        model.conv.weight.data.mul_(1)
    model.items[1].append(3)
    model.items.append(4)
    model.options["a"]["b"] = 7
    model.number, model.new = 9, 1
    assert state.changed()
    state.restore()
    assert not state.changed()
    for ours, theirs in zip(held(model), before, strict=True):
        assert str(ours) == str(theirs)


def test_private_copies_share_memory_as_the_originals_do() -> None:
    x = torch.randn(4, 6)
    a, b, c, d = private_copy([x, x[1:], x.t(), torch.ones(2)])
    assert torch.equal(a, x) and torch.equal(b, x[1:]) and torch.equal(c, x.t())
    a.zero_()
    assert not b.any() and not c.any() and x.any() and d.all()


def test_a_model_runs_on_inputs_of_its_own() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.zero_()

    given = {"x": torch.ones(3)}
    calibrate.run(Writes(), [given, (given["x"],), given["x"]])
    assert given["x"].all()
