"""Which layers are converted, and the reason for every one that is not."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from tilewright.convert import convert_model, report
from tilewright.convert.plan import Plan, make_plan
from tilewright.convert.recipes import Recipe, RecipeLike


def plan(model: nn.Module, recipe: RecipeLike = "int8", **options: object) -> Plan:
    return make_plan(model, Recipe.of(recipe), **options)  # type: ignore[arg-type]


def three_layers() -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(32, 32) for name in ("first", "second", "third")})


class OwnForward(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class OwnName(nn.Linear):
    """Adds nothing."""


def odd_layer(kind: str) -> nn.Module:
    if kind == "lazy":
        return nn.LazyLinear(32)
    if kind == "own forward":
        return OwnForward(32, 32)
    layer = nn.Linear(32, 32, device="meta" if kind == "meta" else None)
    if kind == "float64":
        return layer.double()
    if kind == "NaN":
        layer.weight.data[3, 4] = torch.nan
    elif kind == "Inf":
        layer.weight.data[3, 4] = torch.inf
    elif kind == "pruned":
        prune.l1_unstructured(layer, "weight", 0.5)
    elif kind == "parametrized":
        parametrizations.weight_norm(layer)
    elif kind == "weight_norm":
        with pytest.warns(FutureWarning):
            torch.nn.utils.weight_norm(layer)
    elif kind == "patched":
        layer.forward = lambda x: x  # type: ignore[method-assign]
    elif kind == "state hook":
        layer.register_state_dict_post_hook(lambda *args: None)
    elif kind == "empty":
        return nn.Linear(0, 32)
    return layer


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("lazy", "lazy and has not seen an input"),
        ("own forward", "OwnForward is a subclass of Linear with a forward of its own"),
        ("meta", "on the meta device"),
        ("float64", "is float64, not float32"),
        ("NaN", "holds NaN or Inf"),
        ("Inf", "holds NaN or Inf"),
        ("pruned", "not a plain parameter .*weight_mask"),
        ("parametrized", "parametrized"),
        ("weight_norm", "not a plain parameter .*weight_g"),
        ("patched", "forward was replaced on the instance"),
        ("state hook", "hooks on its state_dict"),
        ("empty", "empty"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_that_cannot_be_converted(kind: str, reason: str) -> None:
    model = nn.ModuleDict({"good": nn.Linear(32, 32), "odd": odd_layer(kind)})
    made = plan(model)
    assert list(made.convert) == ["good"]
    assert re.search(reason, made.skipped["odd"])


def test_a_subclass_that_changes_nothing_is_converted() -> None:
    assert list(plan(nn.Sequential(OwnName(32, 32))).convert) == ["0"]


def test_attention_keeps_the_projection_it_reads() -> None:
    made = plan(nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "fc": nn.Linear(32, 32)}))
    assert list(made.convert) == ["fc"]
    assert "MultiheadAttention reads its weight" in made.skipped["attention.out_proj"]


class Tied(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.body = nn.Linear(32, 32)
        self.decoder = nn.Linear(32, 64, bias=False)
        if how == "same parameter":
            self.decoder.weight = self.embed.weight
        elif how == "same memory":
            self.decoder.weight = nn.Parameter(self.embed.weight.data)
        elif how == "view":
            self.embed = nn.Embedding(80, 32)
            self.decoder.weight = nn.Parameter(self.embed.weight.data[8:72])


@pytest.mark.parametrize("how", ["same parameter", "same memory", "view"])
def test_tied_weights_are_left_alone_even_when_named(how: str) -> None:
    for recipe in ("int8", {"decoder": "int8", "*": "int8"}):
        made = plan(Tied(how), recipe)
        assert list(made.convert) == ["body"]
        assert made.skipped["decoder"] == "its weight is tied to embed.weight"


def test_neighbours_in_one_storage_are_not_tied() -> None:
    flat = torch.randn(2, 32, 32)
    model = three_layers()
    model["first"].weight, model["second"].weight = nn.Parameter(flat[0]), nn.Parameter(flat[1])
    assert list(plan(model).convert) == ["first", "second", "third"]


def test_a_module_with_two_names_is_one_layer_and_not_tied_to_itself() -> None:
    shared = nn.Linear(32, 32)
    assert list(plan(nn.ModuleDict({"a": shared, "b": shared})).convert) == ["a"]
    assert plan(
        nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(32, 32)}), Recipe([("*", "int8")], "b")
    ).skipped == {"a": "excluded by 'b'"}


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(32, 32)
        self.inner = nn.ModuleDict({"head": nn.Linear(32, 32), "vocabulary": nn.Linear(32, 32)})
        self.classifier = nn.Linear(32, 32)

    def get_output_embeddings(self) -> nn.Module:
        return self.inner["vocabulary"]


def test_heads() -> None:
    made = plan(WithHead())
    assert list(made.convert) == ["body", "inner.head"]
    assert "get_output_embeddings() of (root) returns it" in made.skipped["inner.vocabulary"]
    assert "root's 'classifier'" in made.skipped["classifier"]
    assert "classifier" in plan(WithHead(), heads=True).convert
    assert "classifier" in plan(WithHead(), {"classifier": "int8", "*": "int8"}).convert
    assert "classifier" not in plan(WithHead(), {"*class*": "int8"} | {"*": "int8"}).convert


def test_adapters_stay_float() -> None:
    model = nn.ModuleDict({"base_layer": nn.Linear(32, 32), "lora_A": nn.ModuleDict({"default": nn.Linear(32, 4)})})
    assert "LoRA adapter" in plan(model).skipped["lora_A.default"]


def test_first_rule_wins_and_the_rest_is_explained() -> None:
    made = plan(three_layers(), Recipe([("first", None), ("f*", "int8"), ("second", "int4-g32")]))
    assert {name: type(planned.scheme).__name__ for name, planned in made.convert.items()} == {
        "second": "Int4WeightOnly"
    }
    assert made.skipped == {"first": "left alone by the rule 'first'", "third": "no rule of the recipe matches it"}


def test_exclude_and_filter() -> None:
    made = plan(three_layers(), Recipe([("*", "int8")], ["third"]), filter_fn=lambda module, name: name != "first")
    assert list(made.convert) == ["second"]
    assert made.skipped == {"first": "left out by filter_fn", "third": "excluded by 'third'"}


@pytest.mark.parametrize(
    "recipe, message",
    [
        ({"secnd": "int8"}, "pattern 'secnd' matches no layer of ModuleDict; the nearest layer names are 'second'"),
        ({"*": "int8", "re:x.*": None}, "pattern 're:x.*' matches no layer"),
        (Recipe([("*", "int8")], ["typo*"]), "pattern 'typo\\*' matches no layer"),
        ({"type:Conv2d": "int8"}, "pattern 'type:Conv2d' matches no layer"),
    ],
)
def test_a_pattern_that_matches_nothing(recipe: RecipeLike, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(three_layers(), recipe)


def test_a_pattern_that_names_a_container() -> None:
    with pytest.raises(ValueError, match="it names a module that holds layers: did you mean 'block.\\*'"):
        plan(nn.ModuleDict({"block": three_layers()}), {"block": "int8"})
    # To leave something alone, any module may be named.
    model = nn.ModuleDict({"norm": nn.LayerNorm(32), "fc": nn.Linear(32, 32)})
    assert list(plan(model, {"type:LayerNorm": None, "*": "int8"}).convert) == ["fc"]


def test_nothing_to_convert_says_why() -> None:
    with pytest.raises(ValueError, match="it has no layer that a scheme takes .convolutions .*; linear layers"):
        plan(nn.Sequential(nn.ReLU()))
    with pytest.raises(
        ValueError, match="every layer is left alone:\n  left out by filter_fn: 'first', 'second', 'third'"
    ):
        plan(three_layers(), filter_fn=lambda module, name: False)


def test_converted_layers_are_not_converted_again() -> None:
    once = convert_model(three_layers(), {"first": "int8"})
    with pytest.raises(ValueError, match="already converted \\(Int8Linear\\): 'first', 'second', 'third'"):
        convert_model(convert_model(once, "int8"), "int4-g32")
    twice = convert_model(once, "int4-g32")
    assert [type(module).__name__ for module in twice.children()] == ["Int8Linear", "Int4Linear", "Int4Linear"]
    assert [layer.scheme.split(":")[0] for layer in report(twice).layers] == ["w8a8", "w4a16", "w4a16"]
    assert all(layer.weight_error is not None for layer in report(twice).layers)


def test_layers_too_small_to_pay() -> None:
    model = nn.ModuleDict({"small": nn.Linear(1, 4, bias=False), "large": nn.Linear(32, 32)})
    skipped = {layer.name: layer.reason for layer in report(convert_model(model, "int8")).skipped}
    assert skipped == {"small": "too small to pay: 16 bytes would become 20"}
    assert len(report(convert_model(model, {"small": "int8", "large": "int8"})).converted) == 2
    with pytest.raises(ValueError, match="too small to pay"):
        convert_model(nn.Sequential(nn.Linear(1, 4)), "int8")
