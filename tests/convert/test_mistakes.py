"""Typical mistakes, each with the words that say what was meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import tilewright as tw


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.encoder = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(64, 64), "mlp": nn.Linear(64, 64)}) for _ in "ab")
        self.head = nn.Linear(64, 64)

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.encoder:
            x = block["mlp"](block["attn"](x))
        return self.head(x) + mask.sum()


class Pipeline:
    """As of transformers: no module, but it holds one."""

    def __init__(self) -> None:
        self.model, self.tokenizer = Encoder(), None

    def __call__(self, text: str) -> str:
        return text


class Pipelines:
    """As of diffusers: it holds several."""

    def __init__(self) -> None:
        self.unet, self.vae = Encoder(), Encoder()


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 64)).eval()


NET = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
ENCODER = Encoder().eval()
X, IDS = torch.randn(4, 64), torch.arange(8).reshape(2, 4)
IMAGES = torch.randn(4, 3, 8, 8)


class Anything(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 64))

    def forward(self, input_ids: Any = None, positions: Any = None, *more: Any) -> torch.Tensor:
        return super().forward(input_ids if positions is None else input_ids[positions + 100])


class Opaque:
    pass


def convert(recipe: Any = "int8", model: Any = NET, **options: Any) -> Callable[[], Any]:
    return lambda: tw.convert_model(model, recipe, **options)


def data(*items: Any, model: nn.Module = NET, **options: Any) -> Callable[[], Any]:
    return convert(model=model, calibration_data=list(items), **options)


def scripted() -> Any:
    return tw.convert_model(torch.jit.script(NET))


def traced() -> Any:
    return tw.convert_model(torch.jit.trace(NET, X))


def exported(as_module: bool) -> Any:
    program = torch.export.export(NET, (X,))
    return tw.convert_model(program.module() if as_module else program)


def image() -> Any:
    return pytest.importorskip("PIL.Image", reason="a PIL image is what is given").new("RGB", (8, 8))


#: What is done, what it raises, and words that the message must hold.
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    # ---- the model
    "a class": (convert(model=Encoder), TypeError, ("nn.Module", "the class Encoder", "Encoder(...)")),
    "a state dict": (convert(model=NET.state_dict()), TypeError, ("a state dict", "load_state_dict")),
    "a path": (convert(model="small/"), TypeError, ("'small/'", "from_pretrained", "load_model")),
    "a Path": (convert(model=Path("small")), TypeError, ("'small'", "load_model")),
    "None": (convert(model=None), TypeError, ("None", "returned nothing")),
    "arguments swapped": (convert(NET, "int8"), TypeError, ("the model comes first", "convert_model(model, 'int8')")),
    "a scheme first": (convert(NET, tw.Int8Dynamic()), TypeError, ("the model comes first",)),
    "a list of modules": (convert(model=[NET, NET]), TypeError, ("list", "each of its modules")),
    "modules by name": (convert(model={"a": NET}), TypeError, ("dict", "nn.ModuleDict")),
    "a factory": (convert(model=network), TypeError, ("function", "call it")),
    "a pipeline": (
        convert(model=Pipeline()),
        TypeError,
        ("Pipeline", "'model'", "x.model = convert_model(x.model, ...)"),
    ),
    "several models": (convert(model=Pipelines()), TypeError, ("'unet', 'vae'", "x.unet = convert_model(x.unet, ...)")),
    "compiled": (convert(model=torch.compile(NET)), TypeError, ("compiled", "convert first", "torch.compile")),
    "scripted": (scripted, TypeError, ("scripted", "the module it was scripted from")),
    "traced": (traced, TypeError, ("traced", "the module it was traced from")),
    "exported": (lambda: exported(False), TypeError, ("ExportedProgram", "then torch.export")),
    "exported module": (lambda: exported(True), ValueError, ("exported graph", "convert the module, then export it")),
    "no layers": (convert(model=nn.LSTM(8, 8)), ValueError, ("nothing to convert in LSTM", "linear layers")),
    "a number": (convert(model=3), TypeError, ("nn.Module, not int",)),
    "batch-norm trains": (convert("fuse", network().train()), ValueError, ("training mode", "model.eval()")),
    "report of a folder": (lambda: tw.report("small/"), TypeError, ("'small/'", "load_model(folder, factory)")),
    "revert a class": (lambda: tw.revert_model(Encoder), TypeError, ("the class Encoder",)),
    "prune a state dict": (lambda: tw.prune_model(NET.state_dict()), TypeError, ("a state dict",)),
    # ---- the recipe
    "INT8": (convert("INT8"), ValueError, ("preset 'INT8' is unknown", "did you mean 'int8'?")),
    "int-8": (convert("int-8"), ValueError, ("'int-8' is unknown", "did you mean 'int8'?")),
    "int_4": (convert("int_4"), ValueError, ("did you mean 'int4'?",)),
    "W8A8": (convert("W8A8"), ValueError, ("did you mean 'w8a8'?",)),
    "int8_weight_only": (convert("int8_weight_only"), ValueError, ("did you mean 'int8-weight-only'?",)),
    "fp8": (convert("fp8"), ValueError, ("did you mean 'int8'?", "known: w8a8")),
    "float8_e4m3": (convert("e4m3"), ValueError, ("did you mean 'int8'?",)),
    "8bit": (convert("8-bit"), ValueError, ("did you mean 'int8'?",)),
    "nf4": (convert("nf4"), ValueError, ("did you mean 'int4'?",)),
    "Q4_0": (convert("Q4_0"), ValueError, ("did you mean 'int4-g32'?",)),
    "2:4": (convert("2:4"), ValueError, ("did you mean 'sparse24'?",)),
    "another group": (convert("int4-g48"), ValueError, ("'int4-g48' is unknown", "tw.Int4WeightOnly(group_size=48)")),
    "a dtype": (convert(torch.int8), TypeError, ("torch.int8", "did you mean 'int8'?")),
    "bits": (convert(4), TypeError, ("not 4", "did you mean 'int4'?")),
    "a scheme's class": (convert(tw.Int8Static), TypeError, ("the class Int8Static", "write tw.Int8Static()")),
    "a class in a rule": (convert({"*": tw.Int8Dynamic}), TypeError, ("the class Int8Dynamic", "tw.Int8Dynamic()")),
    "a list of rules": (convert([("*", "int8")]), TypeError, ("[('*', 'int8')]", "Recipe([(pattern, scheme), ...])")),
    "a list of one": (convert(["int8"]), TypeError, ("a recipe is a Recipe", "['int8']")),
    "False for None": (convert({"0": False, "*": "int8"}), TypeError, ("not False", "None leaves a layer alone")),
    "a pattern": (convert("encoder.*"), ValueError, ("looks like a pattern", "{'encoder.*': 'int8'}")),
    "a file": (convert("recipe.json"), ValueError, ("Recipe.from_json(json.loads(path.read_text()))",)),
    "JSON text": (convert('{"version": 1}'), ValueError, ("Recipe.from_json(json.loads(text))",)),
    "JSON of another version": (convert({"version": 9, "rules": [], "exclude": []}), ValueError, ("version 9 came",)),
    "Recipe of a name": (lambda: tw.Recipe("int8"), TypeError, ("list of pairs", "'int8'", "Recipe.of")),
    "Recipe of a dict": (lambda: tw.Recipe({"*": "int8"}), TypeError, ("list of pairs", "Recipe.of")),
    "a rule turned round": (lambda: tw.Recipe([("int8", "*")]), TypeError, ("(pattern, scheme)", "('*', 'int8')")),
    "a rule of three": (lambda: tw.Recipe([("*", "int8", 1)]), TypeError, ("a pair", "('*', 'int8', 1)")),
    "no rules": (convert({}), ValueError, ("at least one rule",)),
    "an unknown option": (
        lambda: tw.Int8Dynamic(group_size=32),
        TypeError,
        ("Int8Dynamic has no option 'group_size'", "Int4WeightOnly", "known: range_search"),
    ),
    "an option misspelt": (
        lambda: tw.Int4WeightOnly(groupsize=32),
        TypeError,
        ("no option 'groupsize'", "did you mean 'group_size'?"),
    ),
    "a group in quotes": (
        lambda: tw.Int4WeightOnly(group_size="32"),
        ValueError,
        ("group_size must be an int or None (whole row), not '32'",),
    ),
    "a group of none": (lambda: tw.Int4WeightOnly(group_size=0), ValueError, ("group_size must be positive", "not 0")),
    "a group of threes": (lambda: tw.Sparse24Int4(group_size=6), ValueError, ("groups of four", "6")),
    "an unknown observer": (lambda: tw.Int8Static(observer="max"), ValueError, ("minmax, percentile, mse", "'max'")),
    "a percentile as a share": (lambda: tw.Int8Static(percentile=0.0), ValueError, ("(0, 100]",)),
    # ---- patterns
    "a broken expression": (convert({"re:*.attn": "int8"}), ValueError, ("'re:*.attn'", "without 're:'", "'*.attn'")),
    "a class's name": (convert({"Linear": "int8"}), ValueError, ("'Linear' matches no layer", "'type:Linear'")),
    "a part of a name": (convert({"attn": "int8"}, ENCODER), ValueError, ("did you mean '*.attn'?",)),
    "a name cut short": (convert({"0.attn": "int8"}, ENCODER), ValueError, ("did you mean '*.0.attn'?",)),
    "another case": (convert({"Encoder.*": "int8"}, ENCODER), ValueError, ("did you mean 'encoder.*'?",)),
    "an expression's part": (convert({"re:attn": "int8"}, ENCODER), ValueError, ("did you mean 're:.*attn.*'?",)),
    "an expression unmarked": (
        convert({r"encoder\.\d+\.attn": "int8"}, ENCODER),
        ValueError,
        (r"did you mean 're:encoder\\.\\d+\\.attn'?",),
    ),
    "a container": (convert({"encoder": "int8"}, ENCODER), ValueError, ("holds layers", "'encoder.*'")),
    "a name misspelt": (convert({"encodr.*": "int8"}, ENCODER), ValueError, ("nearest layer names", "encoder.0")),
    "a module in a rule": (convert({NET[0]: "int8"}), TypeError, ("not a module", "the name of this Linear")),
    "a number in a rule": (convert({0: "int8"}), TypeError, ("a string or a class of modules, not 0",)),
    "exclude a module": (convert(exclude=NET[0]), TypeError, ("names and patterns, not modules", "write '0'")),
    "exclude modules": (
        convert(model=ENCODER, exclude=[ENCODER.encoder[1]["attn"]]),
        TypeError,
        ("write 'encoder.1.attn' for this Linear",),
    ),
    "exclude another's module": (convert(exclude=[ENCODER.head]), TypeError, ("Sequential does not hold it",)),
    "exclude a number": (convert(exclude=[0]), TypeError, ("a string or a class of modules, not 0",)),
    "exclude a dict": (convert(exclude={"0": None}), TypeError, ("exclude is a pattern or several in a list",)),
    "exclude what is not there": (convert(exclude="lm_head"), ValueError, ("'lm_head' matches no layer",)),
    "prune without a module": (
        lambda: tw.prune_model(NET, exclude=NET[2]),
        TypeError,
        ("names and patterns, not modules", "write '2'"),
    ),
    # ---- switches and functions
    "heads by name": (convert(heads="head"), TypeError, ("heads is True or False", "{'lm_head': 'int8', '*': 'int8'}")),
    "inplace in words": (convert(inplace="yes"), TypeError, ("inplace is True or False, not 'yes'",)),
    "fuse of activations": (convert(fuse=["relu"]), TypeError, ("fuse is True or False",)),
    "keep without examples": (convert(keep_if_faster=True), ValueError, ("keep_if_faster needs example_inputs",)),
    "transform of nothing": (convert(transform=len), ValueError, ("calibration_data, which was not given",)),
    "transform no function": (data(X, transform="x"), TypeError, ("transform is a function, not 'x'",)),
    "transform a class": (data(X, transform=Opaque), TypeError, ("transform is a function, not the class Opaque",)),
    "forward_fn no function": (data(X, forward_fn=3), TypeError, ("forward_fn is a function, not 3",)),
    "filter_fn a pattern": (convert(filter_fn="*"), TypeError, ("filter_fn(module, name)", "'*'")),
    "filter_fn of one": (convert(filter_fn=lambda name: True), TypeError, ("filter_fn(module, name)", "(name)")),
    "filter_fn of None": (convert(filter_fn=lambda m, name: None), TypeError, ("returns True or False", "'0'", "None")),
    # ---- calibration data
    "data a string": (
        convert(calibration_data="data.txt"),
        TypeError,
        ("calibration_data", "'data.txt'", "transform="),
    ),
    "data a path": (convert(calibration_data=Path("data")), TypeError, ("calibration_data", "load what a path names")),
    "data a number": (convert(calibration_data=128), TypeError, ("calibration_data", "not 128", "into a list")),
    "data a function": (convert(calibration_data=lambda: [X]), TypeError, ("calibration_data", "call the function")),
    "data a class": (convert(calibration_data=TensorDataset), TypeError, ("the class TensorDataset",)),
    "data a module": (convert(calibration_data=NET), TypeError, ("calibration_data", "not a Sequential")),
    "data empty": (data(), ValueError, ("calibration_data is empty",)),
    "data an empty dict": (convert(calibration_data={}), ValueError, ("calibration_data is empty",)),
    "data used up": (convert(calibration_data=iter(())), ValueError, ("calibration_data is empty",)),
    "data None": (data(X, None), TypeError, ("calibration_data, item 1 is None",)),
    "data of text": (
        data("a sentence"),
        RuntimeError,
        ("item 0", "Argument 'input' is text", "transform=", "tokenizer"),
    ),
    "data of lists": (
        data([[101, 102]]),
        RuntimeError,
        ("calibration_data, item 0", "'input' is a list of numbers", "torch.tensor"),
    ),
    "data of token ids": (
        data([101, 102, 103], model=Anything()),
        TypeError,
        ("calibration_data, item 0", "A list gives its values one by one", "torch.tensor"),
    ),
    "a forward_fn that forgets": (
        data(X, forward_fn=lambda model, item: NET(item)),
        ValueError,
        ("calibration_data, item 0: forward_fn(model, item) did not call the model that it was given",),
    ),
    "data of PIL images": (
        lambda: data(image(), model=network())(),
        TypeError,
        ("calibration_data, item 0", "'input' is a PIL image", "transform="),
    ),
    "data of objects": (data(Opaque()), RuntimeError, ("item 0", "'input' is an Opaque, no tensor", "transform=")),
    "arrays of text": (data(np.array(["a"])), RuntimeError, ("item 0", "'input'", "transform=")),
    "another dtype": (data(X, X.double()), RuntimeError, ("item 1", "'input' is float64, the model float32: cast it")),
    "bytes of images": (
        data(IMAGES.to(torch.uint8), model=network()),
        RuntimeError,
        ("item 0", "'input' is uint8, the model float32"),
    ),
    "another device": (data(X.to("meta")), RuntimeError, ("item 0", "'input' is on meta, the model on cpu")),
    "no batch": (
        convert(model=network(), calibration_data=TensorDataset(IMAGES)),
        ValueError,
        ("calibration_data, item 0", "'input' is an image without a batch", "DataLoader"),
    ),
    "rows for batches": (
        convert(model=network(), calibration_data=IMAGES),
        ValueError,
        ("item 0", "an image without a batch", "[tensor] is a single input"),
    ),
    "rows for rows": (
        convert(model=nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).eval(), calibration_data=X),
        ValueError,
        ("item 0", "a row of a tensor", "[tensor] is a single input"),
    ),
    "another shape": (data(torch.randn(2, 5)), RuntimeError, ("item 0", "float32[2, 5]", "forward(input)")),
    "too many alike": (data([*X]), TypeError, ("item 0 gives 4 arguments", "takes 1", "torch.stack")),
    "an argument too few": (
        data((IDS,), model=ENCODER),
        TypeError,
        ("calibration_data, item 0 gives 1 argument", "Encoder.forward(input_ids, mask) needs 'mask' too"),
    ),
    "a label that is taken": (
        data((X, torch.arange(4)), model=Anything()),
        RuntimeError,
        ("calibration_data, item 0", "If a label is among its values: transform=lambda item: item[0]"),
    ),
    "a key too few": (
        data({"input_ids": IDS, "label": 3}, model=ENCODER),
        TypeError,
        ("item 0 has the keys 'input_ids', 'label'", "needs 'mask' too"),
    ),
    "other keys": (
        data({"ids": IDS, "attention": IDS}, model=ENCODER),
        TypeError,
        ("item 0 has the keys 'ids', 'attention'", "needs 'input_ids', 'mask' too"),
    ),
    "a dict for a tensor": (
        data({"image": X, "label": 3}),
        RuntimeError,
        ("item 0", "a dict with the keys 'image', 'label'", "transform=lambda item: item[...]"),
    ),
    "NaN": (data(X, X.where(X < 2, torch.nan)), ValueError, ("calibration_data, item 1, argument 'input'", "NaN")),
    "a transform that fails": (
        data({"text": "a"}, transform=lambda item: item["image"]),
        RuntimeError,
        ("calibration_data, item 0", "transform raised KeyError: 'image'", "a dict with the keys 'text'"),
    ),
    "a transform that forgets": (data(X, transform=lambda item: None), TypeError, ("item 0: transform returned None",)),
    "a forward_fn that fails": (
        data(X, forward_fn=lambda model: None),
        TypeError,
        ("calibration_data, item 0", "forward_fn raised TypeError", "a Tensor"),
    ),
    # ---- example inputs
    "examples a string": (convert(example_inputs="x"), TypeError, ("example_inputs takes an iterable", "'x'")),
    "examples None": (convert(example_inputs=[None]), TypeError, ("example_inputs, item 0 is None",)),
    "examples too few": (
        convert(model=ENCODER, example_inputs=[(IDS,)]),
        TypeError,
        ("example_inputs, item 0 gives 1 argument", "needs 'mask' too"),
    ),
    "examples that fail": (
        convert(example_inputs=torch.randn(2, 5)),
        RuntimeError,
        ("example_inputs, item 0", "float32[2, 5]"),
    ),
    "examples of a report": (
        lambda: tw.report(tw.convert_model(NET), [X.double()], NET),
        RuntimeError,
        ("example_inputs, item 0", "float64"),
    ),
    "report without examples": (
        lambda: tw.report(tw.convert_model(NET), [], NET),
        ValueError,
        ("example_inputs is empty",),
    ),
    "search on text": (
        lambda: tw.search_pruning(NET, ["a"], 0.1),
        RuntimeError,
        ("calibration_data, item 0", "text", "transform="),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_what_was_meant(name: str) -> None:
    act, kind, words = MISTAKES[name]
    with pytest.raises(kind) as raised:
        act()
    assert type(raised.value) is kind, repr(raised.value)
    assert [word for word in words if word not in str(raised.value)] == [], str(raised.value)
    assert not re.search(r"\bx\d+\b|0x[0-9a-f]{6}", str(raised.value)), "no address of an object"


def test_there_are_many() -> None:
    assert len(MISTAKES) >= 100


# ---- what is no mistake
@pytest.mark.parametrize("recipe", ["int8", {"0": None, "*": "int4-g32"}, tw.Int4WeightOnly(group_size=64)])
def test_what_to_json_made_is_a_recipe(recipe: Any) -> None:
    written = tw.Recipe.of(recipe)
    assert tw.Recipe.of(written.to_json()) == written
    kinds = [type(module) for module in tw.convert_model(NET, written.to_json()).modules()]
    assert kinds == [type(module) for module in tw.convert_model(NET, recipe).modules()]


def test_what_to_json_of_a_scheme_made_is_a_recipe() -> None:
    scheme = tw.Int4WeightOnly(group_size=64)
    assert tw.Recipe.of(scheme.to_json()) == tw.Recipe.of(scheme)


@pytest.mark.parametrize("exclude", [None, (), [], "0", ["0"], {"0"}, ("0", "0")])
def test_forms_of_exclude(exclude: Any) -> None:
    converted = tw.convert_model(NET, "int8", exclude=exclude)
    assert (type(converted[0]) is nn.Linear) == bool(exclude)


@pytest.mark.parametrize(
    "pattern", ["encoder", "encoder.0", "enc*", "*.0", nn.ModuleList, "type:ModuleDict", "re:encoder"]
)
def test_a_pattern_that_leaves_a_module_alone_leaves_its_layers_alone(pattern: Any) -> None:
    whole = pattern not in ("encoder.0", "*.0")
    for options in ({"exclude": pattern}, {"recipe": {pattern: None, "*": "int8"}}):
        converted = tw.convert_model(ENCODER, heads=True, **options)
        assert type(converted.encoder[0]["attn"]) is type(converted.encoder[0]["mlp"]) is nn.Linear
        assert (type(converted.encoder[1]["attn"]) is nn.Linear) == whole
        assert type(converted.head) is tw.nn.Int8Linear


def test_the_root_is_no_module_around_its_layers() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 64))
    converted = tw.convert_model(model, "int8", exclude=nn.Sequential)
    assert type(converted[0][0]) is nn.Linear and type(converted[1]) is tw.nn.Int8Linear


def test_schemes_are_still_copied_pickled_and_replaced() -> None:
    import copy
    import dataclasses
    import pickle

    scheme = tw.Int4WeightOnly(group_size=32)
    assert copy.deepcopy(scheme) == pickle.loads(pickle.dumps(scheme)) == scheme  # noqa: S301 (bytes of our own)
    assert dataclasses.replace(scheme, symmetric=True).group_size == 32


def test_a_pipeline_is_converted_as_its_message_says() -> None:
    x = Pipeline()
    x.model = tw.convert_model(x.model, "int8")
    assert type(x.model.encoder[0]["attn"]) is tw.nn.Int8Linear
    assert SimpleNamespace(**vars(x)).tokenizer is None
