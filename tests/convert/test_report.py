from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tilewright.convert import convert_model, report, revert_model
from tilewright.convert.record import ATTRIBUTE
from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.router import Implementation


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_block_with_quite_a_long_name = nn.ModuleList([nn.ModuleDict({"projection": nn.Linear(64, 64)})])
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.a_block_with_quite_a_long_name[0]["projection"](x)))


NAME = "a_block_with_quite_a_long_name.0.projection"


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def test_totals_and_layers() -> None:
    made = report(convert_model(model(), "int8"))
    before, after = 4 * (64 * 64 + 64), 64 * 64 + 4 * 64 + 4 * 64
    rest = 4 * (64 * 64 + 64) + 4 * 2 * 64
    assert made.totals == {
        "layers_converted": 1,
        "layers_skipped": 1,
        "layer_bytes_before": before,
        "layer_bytes_after": after,
        "layer_ratio": after / before,
        "model_bytes_before": before + rest,
        "model_bytes_after": after + rest,
        "model_ratio": (after + rest) / (before + rest),
    }
    layer, head = made.layers
    assert (layer.name, layer.kind, layer.scheme) == (NAME, "Int8Linear", "w8a8")
    assert 0 < layer.weight_error < 0.01 and layer.output_error is None
    assert (head.name, head.kind, head.scheme) == ("head", "Linear", "")
    assert "output head" in head.reason


def test_json_comes_back_whole() -> None:
    data = report(convert_model(model(), "int8")).to_json()
    assert list(data)[:2] == ["model", "totals"]
    read = json.loads(json.dumps(data, allow_nan=False))
    assert [layer["name"] for layer in read["layers"]] == [NAME, "head"]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_text_is_plain_and_loses_no_letter(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = str(report(convert_model(model(), "int8"), torch.randn(4, 64), model()))
    lines = text.splitlines()
    assert lines[0] == "Model: 1 layers converted, 1 left alone"
    assert lines[1].startswith("converted layers: 16.2 KiB -> 4.5 KiB (0.2")
    assert "\x1b" not in text and "…" not in text
    if columns >= 80:
        # Folded cells put together again hold the whole name.
        first_column = "".join(line.split(" ")[0] for line in lines if line and not line.startswith(" "))
        assert NAME in first_column
    assert all(len(line) <= columns for line in lines[4:])


def test_markdown() -> None:
    text = report(convert_model(model(), "int8"), torch.randn(4, 64), model()).to_markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| layer | scheme | M=1 | M=256 | before | after | weight err. | output err. |"
    assert rows[2].startswith(f"| {NAME} | w8a8 | ")
    assert all(row.count("|") == 9 for row in rows[:3]) and all(row.count("|") == 4 for row in rows[3:])


def test_output_error_is_that_of_the_layer_on_the_originals_input() -> None:
    original, x = model(), torch.randn(32, 64)
    converted = convert_model(original, "int8", heads=True)
    made = {layer.name: layer for layer in report(converted, x).layers}  # the original is still there
    with torch.no_grad():
        hidden = original.norm(original.a_block_with_quite_a_long_name[0]["projection"](x))
        expected, actual = original.head(hidden), converted.head(hidden)
    error = (torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected)).item()
    assert made["head"].output_error == pytest.approx(error, rel=1e-4)
    assert 0 < error < 0.02
    for inputs in ([x], [(x,)], {"x": x}, [{"x": x}]):
        again = {layer.name: layer for layer in report(converted, inputs, original).layers}
        assert again["head"].output_error == pytest.approx(error, rel=1e-4)


def test_output_error_needs_the_original() -> None:
    converted = convert_model(model(), "int8")  # the original is gone
    with pytest.raises(ValueError, match="needs original="):
        report(converted, torch.randn(2, 64))
    with pytest.raises(ValueError, match=f"original .Sequential. has no layer called '{NAME}'"):
        report(converted, torch.randn(2, 64), nn.Sequential(nn.Linear(64, 64)))


def test_the_router_is_asked_and_its_reasons_are_shown() -> None:
    def why_not(problem: router.Problem) -> str | None:
        return "takes one row only" if problem.m > 1 else None

    converted = convert_model(model(), "int8")
    preferred = router.route(converted.get_submodule(NAME).problem(m=256)).name
    router.register(Implementation("first choice", "int8_linear", why_not, "nowhere:nothing"), before=preferred)
    try:
        made = report(converted)
    finally:
        router.unregister("int8_linear", "first choice")
    layer = made.converted[0]
    assert layer.implementations == {1: "first choice", 256: preferred}
    assert layer.declined[256][-1] == "first choice: takes one row only"
    assert f"M=256: not by first choice: takes one row only ('{NAME}')" in made.to_markdown()
    # Kernels for another device are in the JSON form only.
    assert all(reason.endswith("not on cpu") for reason in layer.declined[1])
    assert "not on cpu" not in made.to_markdown() + str(made)


def test_models_that_were_not_converted() -> None:
    made = report(model())
    assert not made.converted and {layer.reason for layer in made.skipped} == {"the model was not converted"}
    assert str(made).startswith("Model: nothing converted, 2 layers are as they were")
    assert report(revert_model(convert_model(model(), "int8"))).to_json() == made.to_json()
    assert report(nn.ReLU()).layers == ()


def test_a_part_of_a_model_and_a_model_made_of_parts() -> None:
    converted = convert_model(model(), "int8")
    part = report(converted.a_block_with_quite_a_long_name)
    assert [(layer.name, layer.scheme) for layer in part.converted] == [("0.projection", "w8a8")]
    assert part.converted[0].bytes_before == 4 * (64 * 64 + 64)
    whole = report(nn.ModuleDict({"left": converted, "right": convert_model(model(), "int4-g32")}))
    assert [layer.name for layer in whole.converted] == [f"left.{NAME}", f"right.{NAME}"]
    assert all(layer.weight_error for layer in whole.converted)
    assert "output head" in whole.skipped[0].reason


def test_a_record_of_before_says_the_stem_too() -> None:
    converted = convert_model(model(), "int4-g32")
    (made,) = vars(converted)[ATTRIBUTE].layers.values()
    made.label = "Int4WeightOnly: group_size=32 + relu"  # as checkpoints had it
    assert report(converted).converted[0].scheme == "w4a16: group_size=32 + relu"
