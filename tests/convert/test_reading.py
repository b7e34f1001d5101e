"""Reading the code of a network: on a private copy, in eval mode, without a trace elsewhere, or refused in words."""

from __future__ import annotations

import collections
import functools
import random
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
from tests.convert.networks import SmallMobileNet, SmallResNet, conv_bn, settled, source_of


def picture(channels: int = 4) -> torch.Tensor:
    return torch.randn(2, channels, 9, 7)


def agree(model: nn.Module, converted: nn.Module, *inputs: Any) -> None:
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(converted(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(4, 4)


# ---- eval mode
class Drops(Base):
    def forward(self, x: torch.Tensor) -> Any:
        y = F.dropout(F.relu(self.block(x)), 0.5, self.training)
        return (y, y.mean()) if self.training else y


@pytest.mark.parametrize("recipe", ["fuse", "int8"])
def test_a_factory_s_model_is_in_training_mode_and_read_in_eval_mode(recipe: str, tmp_path: Path) -> None:
    x = picture()
    converted = tw.convert_model(settled(Drops()), recipe, calibration_data=[x] if recipe == "int8" else None)
    tw.save_model(converted, tmp_path)
    loaded = tw.load_model(tmp_path, Drops)
    assert not loaded.training and source_of(loaded) == source_of(converted)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(loaded(x), converted(x))
        assert isinstance(loaded.train()(x), tuple)
        assert isinstance(loaded.eval()(x), torch.Tensor)


def test_a_saved_model_in_training_mode_comes_back_so(tmp_path: Path) -> None:
    converted = tw.convert_model(settled(Drops()), "fuse").train()
    tw.save_model(converted, tmp_path)
    loaded = tw.load_model(tmp_path, Drops)
    assert loaded.training and "self.training" not in source_of(loaded)
    with torch.no_grad():
        y, mean = loaded(picture())
    assert (y == 0).float().mean() > 0.4 and mean.dim() == 0


def test_a_part_that_is_put_into_training_mode_is_so() -> None:
    model = settled(nn.Sequential(*conv_bn(4, 4), nn.Dropout(0.5), nn.ReLU()))
    fused, x = tw.convert_model(model, "fuse"), picture()
    with torch.no_grad():
        quiet = fused(x)
        fused[2].train()
        assert not torch.equal(fused(x), fused(x))
        fused[2].eval()
        torch.testing.assert_close(fused(x), quiet)


def test_an_attribute_that_changes_later_is_read_anew() -> None:
    class Scaled(Base):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.rounds, self.config = 2.0, [1, 2], collections.UserDict()
            self.options = type("Options", (), {})()
            self.options.shift = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in self.rounds:
                x = F.relu(self.block(x)) * self.scale + self.options.shift
            return x

    model = settled(Scaled())
    fused, x = tw.convert_model(model, "fuse"), picture()
    agree(model, fused, x)
    for name, value in (("scale", 3.0), ("rounds", [1]), ("scale", 2)):
        for each in (model, fused):
            setattr(each, name, value)
        agree(model, fused, x)
    for each in (model, fused):
        each.options.shift = -1.0
    agree(model, fused, x)
    fused.rounds.append(3)
    model.rounds.append(3)
    agree(model, fused, x)


# ---- no trace elsewhere
def test_nothing_is_patched_while_code_is_read() -> None:
    """Seen from inside of the reading itself, and by another thread meanwhile."""
    before = {name: vars(nn.Module)[name] for name in ("__call__", "__getattr__", "__setattr__", "_call_impl")}
    seen = types.SimpleNamespace()  # a list would be put back to what it was
    other = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval()

    def look() -> None:
        seen.untouched = all(vars(nn.Module)[name] is value for name, value in before.items())
        seen.result = other(torch.ones(1, 3))

    class Looks(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            return F.relu(self.block(x))

    tw.convert_model(settled(Looks()), "fuse")
    assert seen.untouched and torch.equal(seen.result, other(torch.ones(1, 3)))


def test_other_threads_call_modules_while_one_converts() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    served, x = tw.convert_model(settled(SmallResNet()), "fuse"), torch.randn(1, 1, 12, 12)
    original, rows = settled(SmallMobileNet()), torch.randn(2, 8)
    with torch.no_grad():
        expected = plain(rows), served(x), original(x)
    stop, errors = threading.Event(), collections.Counter[str]()
    calls = 0

    def serve() -> None:
        nonlocal calls
        while not stop.is_set():
            try:
                with torch.no_grad():
                    found = plain(rows), served(x), original(x)
                if not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True)):
                    errors["another answer"] += 1
                calls += 1
            except Exception as error:
                errors[f"{type(error).__name__}: {error}"] += 1

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for recipe in ("fuse", "int8"):
            tw.convert_model(original, recipe, calibration_data=[x] if recipe == "int8" else None)
    finally:
        stop.set()
        thread.join()
    assert not errors and calls


def test_two_threads_convert_at_once() -> None:
    models, x = [settled(SmallMobileNet()) for _ in range(4)], torch.randn(2, 1, 12, 12)
    made: dict[int, nn.Module] = {}
    wrong: list[BaseException] = []
    ready = threading.Barrier(4)

    def convert(number: int) -> None:
        try:
            ready.wait()
            made[number] = tw.convert_model(models[number], "fuse")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=convert, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for number, model in enumerate(models):
        agree(model, made[number], x)
        assert source_of(made[number]) == source_of(made[0])


def test_the_original_keeps_its_forward_and_holds_nothing_symbolic() -> None:
    class Keeps(Base):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(x)
            self.latest = x
            return F.relu(self.block(x))

    model = settled(Keeps())
    converted = tw.convert_model(model, "fuse")
    assert not model.seen and not converted.seen and not hasattr(model, "latest") and not hasattr(converted, "latest")
    assert "forward" not in vars(model)


# ---- what is read
class Asks(Base):
    def forward(self, x: Any) -> torch.Tensor:
        if isinstance(x, (list, tuple)):
            x = torch.cat(list(x), 1)
        y = F.relu(self.block(x))
        return y * 2 if isinstance(y, torch.Tensor) else y


class Makes(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.block(x))
        return y * torch.arange(4).view(1, 4, 1, 1) + torch.tensor([0.5]) + torch.zeros(1)


class ReadsBuffers(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(4, 1, 1))
        self.plain = torch.randn(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.block(x)) * (self.table + 1) - self.plain.exp() + self.block[0].weight.shape[0]


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.block(x))


class KeywordOnly(Base):
    def forward(self, x: torch.Tensor, /, *, scale: float = 2.0) -> torch.Tensor:
        return F.relu(self.block(x)) * scale


class Random(Base):
    """Draws in eval mode: in each call anew."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.block(x)) + torch.rand(1)


@pytest.mark.parametrize("kind", [Asks, Makes, ReadsBuffers, Decorated, KeywordOnly])
def test_code_that_is_read(kind: type[Base]) -> None:
    model = settled(kind())
    fused = tw.convert_model(model, "fuse")
    assert not tw.report(fused).untraced and "'relu'" in source_of(fused)
    agree(model, fused, picture())
    if kind is ReadsBuffers:
        with torch.no_grad():
            for each in (model, fused):
                each.table.add_(1)
                each.plain.mul_(2)
        agree(model, fused, picture())
    if kind is Asks:
        agree(model, fused, [picture(2), picture(2)])
        agree(model, fused, (picture(1), picture(3)))
    if kind is Decorated:
        assert not fused(picture().requires_grad_()).requires_grad


def test_random_numbers_are_drawn_in_each_call() -> None:
    model = settled(Random())
    fused, x = tw.convert_model(model, "fuse"), picture()
    assert "rand" in source_of(fused)
    for number in range(4):
        found = []
        for each in (model, fused):
            torch.manual_seed(number)
            with torch.no_grad():
                found.append(each(x))
            found.append(torch.rand(1))
        torch.testing.assert_close(found[:2], found[2:], rtol=1e-4, atol=1e-5)


# ---- what is refused
def by_python(m: Base, x: torch.Tensor) -> torch.Tensor:
    return m.block(x) * random.random()


def by_numpy(m: Base, x: torch.Tensor) -> torch.Tensor:
    return m.block(x) * float(np.random.random())  # noqa: NPY002 (code as people have it)


def partly_without_gradients(m: Base, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = m.block(x)
    return F.relu(y) * m.block[0].weight.mean()


def other_autocast(m: Base, x: torch.Tensor) -> torch.Tensor:
    y = m.block(x)
    with torch.autocast("cpu", torch.bfloat16):
        return y @ y.transpose(2, 3)


def on_a_value(m: Base, x: torch.Tensor) -> torch.Tensor:
    return m.block(x) if x.sum() > 0 else m.block(-x)


def caught(m: Base, x: torch.Tensor) -> torch.Tensor:
    try:
        return m.block(x) if x.sum() > 0 else m.block(-x)
    except Exception:
        return m.block(x) * 3


def sets_data(m: Base, x: torch.Tensor) -> torch.Tensor:
    y = m.block(x)
    y.data = y.data * 2
    return y


def from_a_closure(tensor: torch.Tensor, m: Base, x: torch.Tensor) -> torch.Tensor:
    return m.block(x) + tensor


REFUSED = {
    by_python: "forward asks random.random, which answers otherwise",
    by_numpy: "numpy.random",
    partly_without_gradients: "switches gradients on or off",
    other_autocast: "switches autocast",
    on_a_value: "branches on a value",
    caught: "branches on a value",
    sets_data: "sets 'data' of a tensor",
    functools.partial(from_a_closure, torch.ones(1)): "a tensor that is no parameter, buffer or attribute",
}


@pytest.mark.parametrize("code", REFUSED, ids=lambda code: getattr(code, "__name__", "from_a_closure"))
def test_code_that_is_refused_says_why_and_stays_what_it_is(code: Any) -> None:
    class Refused(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return code(self, x)

    model = settled(Refused())
    fused = tw.convert_model(model, "fuse")
    assert REFUSED[code] in tw.report(fused).untraced[""], tw.report(fused).untraced
    if code not in (by_python, by_numpy):
        agree(model, fused, picture())
        agree(model, fused, -picture())


def test_a_forward_that_was_replaced_on_the_instance_stays() -> None:
    model = settled(SmallResNet())
    model.forward = lambda x: type(model).forward(model, x) * 2
    fused, x = tw.convert_model(model, "fuse", inplace=True), torch.randn(2, 1, 12, 12)
    assert "its forward was replaced on the instance" in tw.report(fused).untraced[""]
    with torch.no_grad():
        torch.testing.assert_close(fused(x), type(model).forward(model, x) * 2)


def test_what_a_switch_surrounds_is_read_by_itself() -> None:
    class Frozen(Base):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                y = self.block(x)
            return F.relu(self.head(y))

    model = settled(Frozen())
    fused = tw.convert_model(model, "fuse")
    assert list(tw.report(fused).untraced) == [""] and "forward" in vars(fused.block)
    y = fused(picture().requires_grad_())
    agree(model, fused, picture())
    assert y.requires_grad and y.grad_fn is not None
