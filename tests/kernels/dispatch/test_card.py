"""Everything that is said of an operator stands on its card: there is no list beside the cards."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tilewright.deploy.onnx import symbols
from tilewright.deploy.package import plain
from tilewright.kernels import tuning
from tilewright.kernels.dispatch import card as card_module
from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.card import REFERENCE, Card, card_of, cards, folders, make_arguments
from tilewright.kernels.dispatch.library import define

PACKAGE = Path(__file__).resolve().parents[3] / "tilewright"
each_card = pytest.mark.parametrize("card", cards(), ids=lambda card: card.name)
OPERATOR = """
from tilewright.kernels.dispatch.card import Card, everywhere, on_cpu
from tilewright.kernels.dispatch.problem import Problem, device_facts


def check(op, arguments):
    if not arguments["x"].is_floating_point():
        raise TypeError(f"{op}: x must be float, not {arguments['x'].dtype}")


def problem(op, arguments, checked):
    x = arguments["x"]
    return Problem(op, x.numel(), 0, 1, x.dtype, **device_facts(x.device))


def gradients(grad, arguments, required):
    return {"x": grad * arguments["factor"]}


CARDS = (
    Card(
        "scaled_for_a_test",
        __package__,
        "(Tensor x, float factor=2.0) -> Tensor",
        check,
        problem,
        lambda arguments, checked: arguments["x"].new_empty(arguments["x"].shape),
        lambda problem, draw: {"x": draw.normal(problem.m, dtype=problem.x_dtype), "factor": 3.0},
        Problem("scaled_for_a_test", 6, 0, 1, torch.float32),
        implementations=(
            on_cpu("by adding", ".cpu:by_adding"),
            everywhere("reference", ".reference"),
        ),
        differentiable=("x",),
        gradients=gradients,
    ),
)
"""
CPU = """
def why_not(problem):
    return None if problem.m < 100 else "is for few elements"


def by_adding(x, factor=2.0):
    return x * factor + 0
"""
REFERENCE_FILE = "def scaled_for_a_test(x, factor=2.0):\n    return x * factor\n"


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """An operator that one folder adds, and nothing else."""
    folder = tmp_path / "kernels_of_a_test" / "scaled"
    folder.mkdir(parents=True)
    for file in (folder.parent / "__init__.py", folder / "__init__.py"):
        file.touch()
    (folder / "operator.py").write_text("import torch\n" + OPERATOR)
    (folder / "cpu.py").write_text(CPU)
    (folder / "reference.py").write_text(REFERENCE_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    (name,) = folders("kernels_of_a_test")
    (card,) = importlib.import_module(name).CARDS
    if hasattr(torch.ops.tilewright, card.name):  # torch.library keeps what was defined once
        card_module.add(card)
        for way in card.implementations:
            router.register(way.of(card))
    else:
        define(card)
    yield card
    del card_module._cards[card.name]
    router._registered.pop(card.name)
    router.invalidate()
    for module in [module for module in sys.modules if module.startswith("kernels_of_a_test")]:
        del sys.modules[module]


def test_a_folder_adds_an_operator_everywhere(added: Card) -> None:
    op = torch.ops.tilewright.scaled_for_a_test
    arguments = make_arguments(added.example)
    assert torch.equal(op(**arguments), 3 * arguments["x"])
    # routed, with reasons
    assert router.route(added.example).name == "by adding"
    decision = router.route(added.example.with_rows(1000))
    assert decision.name == REFERENCE and decision.declined == (("by adding", "is for few elements"),)
    # checked, differentiated, traced, exported
    with pytest.raises(TypeError, match="scaled_for_a_test: x must be float, not torch.int64"):
        op(torch.ones(3, dtype=torch.int64))
    x = torch.randn(4, requires_grad=True)
    (gradient,) = torch.autograd.grad(op(x, 5.0).sum(), x)
    assert torch.equal(gradient, torch.full((4,), 5.0))
    torch.library.opcheck(op.default, (torch.randn(5, requires_grad=True),))
    # in every walk over all operators
    assert card_of(added.name) is added and added in cards()
    assert op.default in plain.decompositions() and op.default in symbols.decompositions()
    tuned = tuning.implementation_of(added.name)
    assert tuned.heuristic(added.example) == "by adding"
    assert list(tuned.candidates(added.example)) == ["by adding"]
    assert not list(tuning.kernels_for(added.example))


def test_a_card_is_added_once(added: Card) -> None:
    with pytest.raises(ValueError, match="a card of the operator 'scaled_for_a_test' already"):
        card_module.add(added)


@each_card
def test_the_example_is_served_and_its_sample_poses_it(card: Card) -> None:
    with router.record_problems() as problems, torch.no_grad():
        result = getattr(torch.ops.tilewright, card.name)(**make_arguments(card.example))
    posed = problems[0]
    for name in ("op", "m", "k", "x_dtype", "conv", "activation", "bias", "residual", "symmetric"):
        assert getattr(posed, name) == getattr(card.example, name), name
    for tensor in result if isinstance(result, tuple) else (result,):
        assert torch.isfinite(tensor.float()).all()
        if card.name == "quantize_per_tensor_marked" and tensor.is_floating_point():
            assert not tensor.any()  # marks
        elif tensor.is_floating_point():
            assert 0.001 < tensor.float().std() < 10  # scales of rows, or sums of order 1


@each_card
def test_every_implementation_that_takes_the_example_serves_its_sample(card: Card) -> None:
    arguments = make_arguments(card.example)
    for implementation in router.implementations(card.name):
        if implementation.why_not(card.example) is None:
            with torch.no_grad():
                result = implementation.function(**arguments)
            for tensor in result if isinstance(result, tuple) else (result,):
                assert torch.isfinite(tensor.float()).all(), implementation.name


@each_card
def test_samples_are_drawn_anew_and_without_memory(card: Card) -> None:
    first, same, other = (make_arguments(card.example, seed=seed) for seed in (0, 0, 1))
    meta = make_arguments(card.example, "meta")
    tensors = {name: value for name, value in first.items() if isinstance(value, torch.Tensor)}
    assert tensors
    for name, value in tensors.items():
        assert torch.equal(value, same[name])
        assert meta[name].is_meta and (meta[name].shape, meta[name].dtype) == (value.shape, value.dtype)
    assert any(not torch.equal(value, other[name]) for name, value in tensors.items())


@each_card
def test_the_last_implementation_is_the_definition(card: Card) -> None:
    assert card.implementations[-1].name == REFERENCE
    names = [way.name for way in card.implementations]
    assert [one.name for one in router.implementations(card.name)] == names
    assert router.implementations(card.name)[-1].function.__name__ == card.name


def _strings(node: ast.AST) -> list[str]:
    """Text in a display of a list, tuple, set or dict."""
    items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
    return [item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)]


def test_no_list_of_operators_stands_beside_the_cards() -> None:
    """Two names of operators in one display of Python are a second list."""
    names = {card.name for card in cards()}
    c_functions = PACKAGE / "kernels" / "cpu" / "native.py"  # some are called as operators are
    own = {importlib.util.find_spec(card.package).submodule_search_locations[0] for card in cards()}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if str(path.parent) in own or path == c_functions:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.List, ast.Tuple, ast.Set, ast.Dict)) and len(names & set(_strings(node))) > 1:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not found, "lists of operators, which belong on their cards"
