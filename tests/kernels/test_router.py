"""The router: order, reasons, plugins. It needs no tensor and no GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.card import cards
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import Implementation, load_plugin, register, route, unregister

#: Operators that a problem without the sizes of a convolution is about.
LINEAR = [card.name for card in cards() if card.example.conv is None]

SMALL = Problem("int8_linear", 4, 32, 64, torch.float32)


def yes(problem: Problem) -> None:
    return None


def double_everything(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
    return x.new_full((*x.shape[:-1], len(weight)), 2.0)


def no(problem: Problem) -> str:
    return "the moon is full"


@pytest.fixture
def restored() -> Iterator[None]:
    """Whatever the test registers is taken back."""
    before = {op: router.implementations(op) for op in LINEAR}
    yield
    for op, kept in before.items():
        for one in router.implementations(op):
            if one not in kept:
                unregister(op, one.name)


def mine(why_not: Any = yes) -> Implementation:
    return Implementation("mine", "int8_linear", why_not, f"{__name__}:double_everything")


@pytest.mark.parametrize("op", LINEAR)
def test_every_problem_has_an_answer(op: str) -> None:
    """The reference, which comes last, takes what nothing else does; empty problems included."""
    assert router.implementations(op)[-1].name == "reference"
    for m, n, k in ((0, 8, 8), (8, 0, 8), (8, 8, 0), (1, 1, 1), (1000, 1000, 1000)):
        problem = Problem(op, m, n, k, torch.float32, group_size=max(k, 1))
        decision = route(problem)
        assert decision.name
        assert all(reason for _, reason in decision.declined)


def test_a_decision_names_those_preferred_with_their_reasons(restored: None) -> None:
    first = router.implementations("int8_linear")[0].name
    register(mine(no), before=first)
    decision = route(SMALL)
    assert ("mine", "the moon is full") in decision.declined
    assert "mine: the moon is full" in str(decision)
    assert decision.name != "mine"


def test_the_first_that_is_willing_serves_and_operators_ask_the_router(restored: None) -> None:
    x, weight, scale = torch.randn(4, 64), torch.ones(32, 64, dtype=torch.int8), torch.ones(32)
    before = torch.ops.tilewright.int8_linear(x, weight, scale)
    register(mine(), before=router.implementations("int8_linear")[0].name)
    assert route(SMALL).name == "mine"
    assert (torch.ops.tilewright.int8_linear(x, weight, scale) == 2).all()
    unregister("int8_linear", "mine")
    assert torch.equal(torch.ops.tilewright.int8_linear(x, weight, scale), before)


def test_a_new_implementation_is_the_least_preferred_by_default(restored: None) -> None:
    register(mine())
    assert router.implementations("int8_linear")[-1].name == "mine"


def test_registering_twice_or_before_nobody_is_refused(restored: None) -> None:
    register(mine())
    with pytest.raises(ValueError, match="'int8_linear' already has an implementation called 'mine'"):
        register(mine())
    other = dataclasses.replace(mine(), name="other")
    with pytest.raises(ValueError, match="no implementation called 'nobody', only .*reference"):
        register(other, before="nobody")
    with pytest.raises(ValueError, match="no implementation called 'nobody'"):
        unregister("int8_linear", "nobody")


def test_when_nobody_is_willing_every_reason_is_given(restored: None) -> None:
    register(Implementation("stubborn", "no_such_op", no, "nowhere:nothing"))
    with pytest.raises(NotImplementedError, match="no_such_op takes .*stubborn: the moon is full"):
        route(Problem("no_such_op", 1, 1, 1, torch.float32))
    unregister("no_such_op", "stubborn")
    with pytest.raises(NotImplementedError, match="nothing is registered"):
        route(Problem("no_such_op", 1, 1, 1, torch.float32))


def test_problems_of_absent_gpus_can_be_asked_about() -> None:
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0)):
        for op in LINEAR:
            for m in (1, 16, 128, 4096):
                problem = Problem(
                    op, m, 4096, 4096, torch.float16, "cuda", capability, multiprocessors=100, group_size=128
                )
                assert "cpu" not in route(problem).implementation.target
    assert not torch.cuda.is_initialized()


def test_a_problem_keeps_all_but_its_rows() -> None:
    assert SMALL.with_rows(9) == dataclasses.replace(SMALL, m=9)
    assert SMALL.multiply_dtype == torch.float32
    assert dataclasses.replace(SMALL, compute_dtype=torch.bfloat16).multiply_dtype == torch.bfloat16


# ---- plugins: only by name, never on import
loaded: list[str] = []


def offer() -> None:
    loaded.append("mine")
    register(mine())


def test_a_plugin_is_loaded_by_name_only(restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("moonlight", f"{__name__}:offer", router.PLUGIN_GROUP)
    monkeypatch.setattr(router, "entry_points", lambda group: [point] if group == router.PLUGIN_GROUP else [])
    monkeypatch.setattr(EntryPoint, "load", lambda self: offer)
    loaded.clear()
    route(SMALL)
    assert not loaded
    with pytest.raises(ValueError, match="'sunlight'; installed: moonlight"):
        load_plugin("sunlight")
    assert not loaded
    load_plugin("moonlight")
    assert loaded == ["mine"]
    assert "mine" in [one.name for one in router.implementations("int8_linear")]


def test_without_plugins_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "entry_points", lambda group: [])
    with pytest.raises(ValueError, match="installed: none"):
        load_plugin("moonlight")
