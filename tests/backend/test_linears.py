"""Linear layers in the backend: quantised by a recipe, with their epilogues, as convert_model does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
from tests.backend.networks import Block, Feed, compiled, last, settled
from tilewright.backend import compile_report, tilewright
from tilewright.kernels.dispatch.same import version_of


# ---- linear layers
@pytest.mark.parametrize("recipe", ["int8", "int8-weight-only", "int4-g32", "int8-int4-g32"])
def test_a_recipe_quantises_as_convert_model_does(recipe: str) -> None:
    model = Feed().eval()
    converted = tw.convert_model(model, recipe)
    x = torch.randn(3, 5, 64)
    run = compiled(model, recipe=recipe)
    with torch.no_grad():
        torch.testing.assert_close(run(x), converted(x), rtol=1e-5, atol=1e-5)
    assert [(rewrite.kind, rewrite.layer, rewrite.what) for rewrite in last().rewrites if rewrite.kind != "linear"] == [
        ("epilogue", "up", "gelu"),
        ("epilogue", "down", "residual"),
    ]
    assert last().count("linear") == 2


def test_without_a_recipe_linear_layers_are_exactly_what_they_were() -> None:
    model, x = Feed().eval(), torch.randn(4, 64)
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))
    assert not last().rewrites
    assert set(last().left) == {"up", "down"}


def test_a_model_that_is_converted_already_gains_epilogues() -> None:
    model = tw.convert_model(Feed().eval(), "int8")
    x = torch.randn(4, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-5, atol=1e-6)
    assert [(rewrite.layer, rewrite.what) for rewrite in last().rewrites] == [("up", "gelu"), ("down", "residual")]


def test_a_sum_that_is_written_over_an_input_still_is() -> None:
    layer, conv = nn.Linear(64, 64).eval(), nn.Conv2d(4, 4, 1).eval()

    def adds(module: nn.Module) -> Any:
        def add(x: torch.Tensor) -> torch.Tensor:
            x += module(x)
            return x * 1.0

        return add

    for module, shape in ((layer, (3, 64)), (conv, (2, 4, 5, 5))):
        torch._dynamo.reset()
        given, expected = torch.randn(shape), None
        with torch.no_grad():
            expected = given + (tw.convert_model(module, "int8") if module is layer else module)(given)
            found = compiled(adds(module), recipe="int8")(given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


def test_rules_exclusions_and_heads_are_those_of_convert_model() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.classifier = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.second(self.first(x)))

    model, x = Classifier().eval(), torch.randn(2, 64)
    with torch.no_grad():
        compiled(model, recipe={"first": None, "*": "int8"})(x)
        assert last().left["first"] == "left alone by the rule 'first'"
        assert "output head" in last().left["classifier"]
        assert [rewrite.layer for rewrite in last().rewrites] == ["second"]
        torch._dynamo.reset()
        compiled(model, recipe="int8", exclude="sec*", heads=True)(x)
    assert [rewrite.layer for rewrite in last().rewrites] == ["first", "classifier"]
    assert "excluded" in last().left["second"]


def test_tied_embeddings_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(128, 64)
            self.out = nn.Linear(64, 128, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.embedding(ids))

    model, ids = Tied().eval(), torch.arange(4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, recipe="int8")(ids), model(ids))
    assert not last().rewrites
    assert "tied" in next(iter(last().left.values()))


def test_transformers_style_addmm_is_a_linear_layer() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(64, 32)), nn.Parameter(torch.randn(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x, self.weight)

    model, x = Conv1D().eval(), torch.randn(5, 64)
    linear = nn.Linear(64, 32)
    linear.weight, linear.bias = nn.Parameter(model.weight.detach().t().contiguous()), model.bias
    with torch.no_grad():
        expected = tw.convert_model(nn.Sequential(linear), "int8")(x)
        torch.testing.assert_close(compiled(model, recipe="int8")(x), expected)


def test_one_layer_called_twice_is_quantised_once() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.cell(F.relu(self.cell(x)))

    model, x = Recurrent().eval(), torch.randn(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(model, recipe="int8")(x), tw.convert_model(model, "int8")(x), rtol=1e-5, atol=1e-6
        )
    assert last().count("linear") == 1


def test_attention_that_reads_its_weights_is_reported() -> None:
    model = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        compiled(lambda x: model(x, x, x, need_weights=False)[0], recipe="int8")(x)
    assert any("MultiheadAttention" in reason for reason in last().left.values())


# ---- weights may change
def test_a_weight_written_to_is_quantised_anew() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)
    run = compiled(model, recipe="int8")
    with torch.no_grad():
        run(x)
        model[0].weight.mul_(-2.0)
        torch.testing.assert_close(run(x), tw.convert_model(model, "int8")(x))
        model.load_state_dict({"0.weight": torch.randn(64, 64), "0.bias": torch.randn(64)})
        torch.testing.assert_close(run(x), tw.convert_model(model, "int8")(x))
    assert len(compile_report()) == 1


def test_statistics_written_to_are_folded_anew() -> None:
    model, x = settled(Block()), torch.randn(2, 8, 5, 5)
    run = compiled(model)
    with torch.no_grad():
        run(x)
        model.bn1.running_mean.add_(1.0)
        torch.testing.assert_close(run(x), model(x))


def test_layers_that_share_compiled_code_keep_their_own_weights() -> None:
    """Dynamo compiles equal layers once and passes their parameters in."""
    layers = nn.ModuleList(Feed() for _ in range(3)).eval()
    expected = [tw.convert_model(layer, "int8") for layer in layers]
    for layer in layers:
        layer.compile(backend=tilewright, options={"inner": "aot_eager", "recipe": "int8"})
    x = torch.randn(4, 64)
    with torch.no_grad():
        for _ in range(2):
            for layer, converted in zip(layers, expected, strict=True):
                torch.testing.assert_close(layer(x), converted(x), rtol=1e-5, atol=1e-5)


def test_gradients_reach_what_is_not_quantised() -> None:
    model, x = Feed().train(), torch.randn(4, 64, requires_grad=True)
    model.drop.p = 0.0
    run = compiled(model, recipe="int8")
    run(x).square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert model.up.bias.grad is not None and model.norm.weight.grad is not None
    assert model.up.weight.grad is None
    assert any("gets none" in note for note in last().notes)


def test_under_autocast_the_quantised_layer_casts_as_a_linear_layer_does() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval(), torch.randn(2, 64)
    run = compiled(model, recipe="int8")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = run(x), model(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


# ---- edges
def test_a_graph_without_layers_is_passed_on() -> None:
    run = compiled(lambda x: x.sin() + 1, recipe="int8")
    x = torch.randn(3)
    torch.testing.assert_close(run(x), x.sin() + 1)
    assert str(last()).startswith("graph: nothing rewritten")


def test_empty_batches_and_nan_pass() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval()
    run = compiled(model, recipe="int8", dynamic=True)
    x = torch.randn(3, 64)
    x[1] = torch.nan
    with torch.no_grad():
        found = run(x)
        assert found[1].isnan().all() and not found[[0, 2]].isnan().any()
        torch._dynamo.reset()
        assert compiled(model, recipe="int8")(x[:0]).shape == (0, 64)


def test_rewrites_can_be_switched_off() -> None:
    model = tw.convert_model(Feed().eval(), "int8")
    with torch.no_grad():
        compiled(model, rewrites="linear")(torch.randn(2, 64))
    assert not last().rewrites


@pytest.mark.slow
def test_inductor_compiles_what_comes_out() -> None:
    model = nn.Sequential(Feed(), Feed()).eval()
    x = torch.randn(4, 64)
    with torch.no_grad():
        expected = tw.convert_model(model, "int8")(x)
        torch.testing.assert_close(compiled(model, "inductor", recipe="int8")(x), expected, rtol=1e-4, atol=1e-4)


def test_versions_of_inference_tensors_are_known() -> None:
    with torch.inference_mode():
        weight = torch.ones(2)
    assert version_of(weight) == -1
