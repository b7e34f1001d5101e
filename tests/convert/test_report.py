from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tilewright.convert import convert_model, report, revert_model
from tilewright.convert.record import ATTRIBUTE
from tilewright.convert.report import Report
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
        "layer_bytes_kept": 0,
        "layer_ratio": after / before,
        "model_bytes_before": before + rest,
        "model_bytes_after": after + rest,
        "model_ratio": (after + rest) / (before + rest),
        "converted_share": before / (before + rest),
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


class Blocks(nn.Module):
    """``count`` blocks of linear layers with long names, and a convolution."""

    def __init__(self, count: int) -> None:
        super().__init__()
        names = ("query", "key_and_value_projection_of_the_self_attention")
        self.stem = nn.Conv2d(8, 8, 3)
        self.encoder = nn.ModuleDict(
            {
                "layer_with_a_name": nn.ModuleList(
                    nn.ModuleDict({"attention": nn.ModuleDict({name: nn.Linear(64, 64) for name in names})})
                    for _ in range(count)
                )
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(1)
        for block in self.encoder["layer_with_a_name"]:
            x = x + sum(layer(x) for layer in block["attention"].values())
        return x


MIXED = {"*.3.*": None, "*.1.*.query": "w4a16-g32", "*.query": "w8a8", "stem": "fuse", "*": "w8a16"}


def blocks_report(recipe: object, count: int = 6, errors: bool = True) -> Report:
    torch.manual_seed(0)
    blocks = Blocks(count)
    # The convolution leaves 64 values of each image.
    return report(convert_model(blocks, recipe), torch.randn(4, 8, 4, 6) if errors else None, blocks)


REPORTS: dict[str, Callable[[], Report]] = {
    "mixed": lambda: blocks_report(MIXED),
    "without-inputs": lambda: blocks_report(MIXED, errors=False),
    "many": lambda: blocks_report("int8", 100),
    "one": lambda: report(convert_model(model(), "int8"), torch.randn(4, 64), model()),
    "root": lambda: report(convert_model(nn.Linear(64, 64), "w4a8", heads=True)),
    "not-converted": lambda: report(Blocks(6)),
    "nothing": lambda: report(nn.ReLU()),
}


@functools.cache
def made_report(name: str) -> Report:
    return REPORTS[name]()


@pytest.fixture(params=REPORTS)
def made(request: pytest.FixtureRequest) -> Report:
    return made_report(request.param)


def matches(pattern: str, name: str) -> bool:
    """Whether a name is one of those that a pattern of the report stands for."""
    parts, given = pattern.replace("(root)", "").split("."), name.split(".")

    def among(part: str, number: str) -> bool:
        if not part.startswith(("*", "{")):
            return part == number
        ranges = [run.partition("-") for run in part.strip("{}").split(",")]
        return number.isdecimal() and (part == "*" or any(int(a) <= int(number) <= int(b or a) for a, _, b in ranges))

    return len(parts) == len(given) and all(map(among, parts, given))


@pytest.mark.parametrize("columns", [40, 80, 100, 200])
def test_text_fits_the_terminal(made: Report, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for text in (str(made), made.details()):
        assert "\x1b" not in text and "…" not in text
        wide = [line for line in text.splitlines() if len(line) > columns]
        assert all(re.fullmatch(r" *\S+( x\d+,?)?", line) for line in wide), wide


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_a_name_breaks_at_dots_alone(made: Report, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for text, names in (
        (str(made), [group.pattern for group in made.groups()]),
        (made.details(), [layer.name or "(root)" for layer in made.converted]),
    ):
        pieces = [piece for name in names for piece in re.findall(r"[^.]+\.?", name)]
        first_words = [line.split(" ")[0] for line in text.splitlines()]
        assert all(name in "".join(first_words) for name in names)
        assert all(any(piece in word for word in first_words) for piece in pieces)


def test_rows_are_all_layers_once_and_patterns_match_no_other(made: Report) -> None:
    groups, totals = made.groups(), made.totals
    assert made.converted == sorted((layer for group in groups for layer in group.layers), key=made.layers.index)
    assert sum(group.total("bytes_before") for group in groups) == totals["layer_bytes_before"]
    assert sum(group.total("bytes_after") for group in groups) == totals["layer_bytes_after"]
    for group in groups:
        assert [layer for layer in made.layers if matches(group.pattern, layer.name)] == list(group.layers)
        assert len({(layer.kind, layer.scheme, *layer.implementations.values()) for layer in group.layers}) == 1


def test_like_layers_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    part = "encoder.layer_with_a_name"
    assert [group.pattern for group in made_report("many").groups()][-2:] == [
        f"{part}.*.attention.query",
        f"{part}.*.attention.key_and_value_projection_of_the_self_attention",
    ]
    patterns = [group.pattern for group in made_report("mixed").groups()]
    assert {f"{part}.{{0,2,4-5}}.attention.query", f"{part}.1.attention.query"} < set(patterns)
    lines = str(made_report("mixed")).splitlines()
    row = next(line for line in lines if line.startswith(f"{part}.{{0,2,4-5}}.attention.query"))
    assert re.search(r"  x4  w8a8 .*  \d\.\d\d-\d\.\d\d %  \d\.\d\d-\d\.\d\d %$", row)
    worst = max(made_report("mixed").converted, key=lambda layer: layer.output_error or 0)
    assert f"largest output error: {100 * worst.output_error:.2f} %, {worst.name}" in lines
    assert "left alone: 2 layers, 32.5 KiB" in lines and "2 layers, 32.5 KiB: left alone by the rule '*.3.*'" in lines
    assert len(made_report("many").details().splitlines()) > 200 > 20 > len(str(made_report("many")).splitlines())


def test_what_has_no_room_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    header = next(line for line in str(made_report("mixed")).splitlines() if line.startswith("layer "))
    titles = re.split("  +", header)
    monkeypatch.setenv("COLUMNS", "80")
    lines = str(made_report("mixed")).splitlines()
    narrow = re.split("  +", next(line for line in lines if line.startswith("layer ")))
    missing = [title for title in titles if title not in narrow]
    assert missing and f"no room for {', '.join(missing)} in 80 columns" in lines


def test_errors_that_are_unknown_or_no_number() -> None:
    layer = dataclasses.replace(made_report("one").converted[0], output_error=math.nan, weight_error=None)
    made = Report("Model", (layer,), 10, 5)
    (group,) = made.groups()
    assert (group.errors("output_error"), group.errors("weight_error")) == ("-", "-")
    assert "nan" not in str(made).lower() and not any(line.startswith("largest") for line in made.headlines())


def test_markdown() -> None:
    rows = [line for line in made_report("one").to_markdown().splitlines() if line.startswith("|")]
    assert rows[0].startswith("| layer | scheme | M=1") and rows[0].endswith(
        "| before | after | weight err. | output err. |"
    )
    assert rows[2].startswith(f"| {NAME} | w8a8 | ")
    assert all(row.count("|") == rows[0].count("|") for row in rows[:3]) and all(
        row.count("|") == 4 for row in rows[3:]
    )
    short, long = made_report("many").to_markdown(), made_report("many").to_markdown(every_layer=True)
    assert "| x100 | w8a8 |" in short and len(short.splitlines()) < 25
    assert all(f"| {layer.name} |" in long for layer in made_report("many").converted)


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
