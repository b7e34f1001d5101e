from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from tilewright.convert import convert_model, report
from tilewright.convert.recipes import ALIASES, PRESETS, Recipe, Rule, matches, names_explicitly
from tilewright.convert.schemes import Int4WeightOnly, Int8Dynamic, Int8Static, registered_schemes
from tilewright.nn.kinds import registered_kinds


@pytest.mark.parametrize(
    "pattern, name, expected",
    [
        ("*", "encoder.0.attn.q", True),
        ("*", "", True),  # a root that is itself a layer
        ("encoder.*.q", "encoder.0.attn.q", True),  # `*` crosses dots
        ("encoder.*.q", "encoder.0.attn.qk", False),
        ("Encoder.*", "encoder.0", False),  # case matters on every system
        ("encoder", "encoder.0", False),
        ("layers.[01].*", "layers.1.fc", True),
        ("re:layers\\.[0-3]\\..*", "layers.2.fc", True),
        ("re:layers", "layers.2.fc", False),  # the whole name must match
        ("type:Linear", "anything", True),
        ("type:Module", "anything", True),  # base classes count
        ("type:torch.nn.modules.linear.Linear", "anything", True),
        ("type:Conv2d", "anything", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name, nn.Linear(1, 1)) is expected


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("lm_head", True),
        ("*.lm_head", True),
        ("*", False),
        ("*head", False),
        ("lm_head.*", False),
        ("type:Linear", False),
        ("re:lm_head", False),
    ],
)
def test_what_spells_out_a_name(pattern: str, expected: bool) -> None:
    assert names_explicitly(pattern) is expected


@pytest.mark.parametrize(
    "expression",
    ["(a+)+$", "(.*)*x", "(a|ab)*c", "(a?){30}a{30}", "a?" * 30 + "a{30}", ".*" * 8 + "x", "(?:layer\\.\\d+\\.)*x"],
)
def test_an_expression_that_may_take_for_ever_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="in so many ways"):
        Recipe.of({f"re:{expression}": "int8"})


@pytest.mark.parametrize(
    "expression, name",
    [
        (r".*layers\.\d+\..*attn.*proj.*", "model.layers.11.self_attn.q_proj"),
        (r"(?:.*\.)?(?:q_proj|k_proj)", "q_proj"),
        (r"(?!.*head).*\.(self|output)\.(query|key|value|dense).*", "encoder.layer.0.attention.self.query"),
        (r"(ab)*\.x{2,4}", "abab.xxx"),
    ],
)
def test_expressions_that_people_write_are_taken(expression: str, name: str) -> None:
    assert matches(f"re:{expression}", name, nn.Linear(1, 1))


def test_forms_of_a_recipe() -> None:
    assert Recipe.of("int8").rules == (Rule("*", Int8Dynamic()), Rule("*", Int8Static()))
    assert Recipe.of(Int8Dynamic()).rules == Recipe.of("int8").rules[:1]
    given = {"lm_head": None, nn.Linear: "int8", "*": Int4WeightOnly(group_size=32)}
    assert Recipe.of(given).rules == (
        Rule("lm_head", None),
        Rule("type:torch.nn.modules.linear.Linear", Int8Dynamic()),
        Rule("type:torch.nn.modules.linear.Linear", Int8Static()),
        Rule("*", Int4WeightOnly(group_size=32)),
    )
    recipe = Recipe([("*", "int8")], exclude="a.*")
    assert Recipe.of(recipe) is recipe
    assert recipe.excluding(["b", nn.Embedding]).exclude == ("a.*", "b", "type:torch.nn.modules.sparse.Embedding")


def test_json_round_trip() -> None:
    recipe = Recipe([("a.*", None), (nn.Linear, "int4-g32"), ("re:x+", "int8")], exclude=["b.*"])
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_recipe(name: str) -> None:
    assert Recipe.from_json(Recipe.of(name).to_json()) == Recipe.of(name)


def test_every_format_has_one_stem() -> None:
    for kind in registered_schemes().values():
        assert kind.stem() in PRESETS or not kind.__module__.startswith("tilewright."), kind
    for kind in registered_kinds().values():
        assert kind.scheme_name in PRESETS, kind
    for name, scheme in PRESETS.items():
        assert ALIASES.get(name, name).startswith(scheme.stem()) and scheme.stem() in PRESETS
    assert not set(ALIASES) & set(ALIASES.values())


@pytest.mark.parametrize("alias, name", ALIASES.items())
def test_an_alias_is_the_same_recipe(alias: str, name: str) -> None:
    assert Recipe.of(alias) == Recipe.of(name)


@pytest.mark.parametrize("name", PRESETS)
def test_the_report_of_a_conversion_says_the_stem(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64))
    data = [torch.randn(2, 16, 4, 4) for _ in range(2)]
    stems = {rule.scheme.stem() for rule in Recipe.of(name).rules if rule.scheme}
    reported = report(convert_model(model, name, calibration_data=data, heads=True)).converted
    assert {re.split("[: ]", layer.scheme)[0] for layer in reported} & stems
    assert {re.split("[: ]", layer.scheme)[0] for layer in reported} <= stems | {"fuse"}


@pytest.mark.parametrize(
    "recipe, error, message",
    [
        ("in8", ValueError, "preset 'in8' is unknown, did you mean 'int8'.*known: w8a8, w8a8-static"),
        ({"*": "int5"}, ValueError, "preset 'int5' is unknown"),
        ({}, ValueError, "at least one rule"),
        ({"re:(": "int8"}, ValueError, "'re:\\(' is no regular expression"),
        ({"type:": "int8"}, ValueError, "names no class"),
        ({"*": 8}, TypeError, "not 8"),
        ({3: "int8"}, TypeError, "a string or a class of modules, not 3"),
        (None, TypeError, "not None"),
    ],
)
def test_what_is_no_recipe(recipe: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recipe.of(recipe)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 7}, "version 7 came"),
        ({"rule": []}, "has the keys version, rules and exclude"),
        ({"rules": [{"pattern": "*"}]}, "a rule in JSON has the keys pattern and scheme"),
        ({"rules": [{"pattern": "*", "scheme": {"scheme": "No", "version": 1}}]}, "scheme 'No' is unknown"),
    ],
)
def test_json_that_is_no_recipe(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_json({**Recipe.of("int8").to_json(), **change})
