"""``convert_model(..., keep_dequantized=True)``: what becomes of the wish, and what is said of the memory it takes."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright.convert.recipes import Recipe
from tilewright.kernels.cpu import choices, native
from tilewright.kernels.dispatch.packed import packed_bytes
from tilewright.nn import Int4Linear, Int8Linear, Int8WeightOnlyLinear

WISHES = ["int4", "int8-weight-only"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 256)).eval()


@pytest.fixture
def from_16_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a weight can be kept, it is used from 16 rows on, whatever is faster."""
    if native.why_no_native() or native.isa() == "avx512_bf16":
        pytest.skip("nothing is kept in bfloat16 here")
    for held in choices.KEPT:
        monkeypatch.setitem(choices.KEPT, held, (16, 0))


def converted(recipe: Any = "int4", **options: Any) -> nn.Module:
    return tw.convert_model(network(), recipe, keep_dequantized=True, fuse=False, **options)


@pytest.mark.parametrize("recipe", WISHES)
def test_every_layer_of_a_preset_has_the_wish(recipe: str):
    model = converted(recipe)
    assert all(layer.keep_dequantized for layer in (model[0], model[2]))
    assert not any(layer.keep_dequantized for layer in tw.convert_model(network(), recipe) if hasattr(layer, "config"))


def test_rules_without_such_layers_are_as_they_were():
    model = converted({"0": "int8", "*": "int4"})
    assert isinstance(model[0], Int8Linear) and isinstance(model[2], Int4Linear)
    assert not model[0].keep_dequantized and model[2].keep_dequantized
    recipe = Recipe.of("int4")
    assert recipe.keeping_dequantized() == Recipe.of(tw.Int4WeightOnly(keep_dequantized=True)) != recipe
    assert Recipe.from_json(recipe.keeping_dequantized().to_json()) == recipe.keeping_dequantized()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="keep_dequantized is for weights that are multiplied with float activations"):
        converted("int8")
    with pytest.raises(TypeError, match="keep_dequantized is True or False, not 'yes'"):
        tw.convert_model(network(), "int4", keep_dequantized="yes")
    with pytest.raises(TypeError, match="keep_dequantized is True or False, not 1"):
        tw.Int8WeightOnly(keep_dequantized=1)
    with pytest.raises(TypeError, match="Int8WeightOnly, Int4WeightOnly have it"):
        tw.Int8Dynamic(keep_dequantized=True)


@pytest.mark.parametrize("recipe", WISHES)
def test_the_report_states_its_bytes(recipe: str, from_16_rows: None):
    model, plain = converted(recipe), tw.convert_model(network(), recipe, fuse=False)
    told, other = tw.report(model), tw.report(plain)
    held = [layer.kept_bytes() for layer in (model[0], model[2])]
    assert [layer.bytes_kept for layer in told.converted] == held and min(held) > 0
    assert told.totals["layer_bytes_kept"] == sum(held) == told.to_json()["totals"]["layer_bytes_kept"]
    assert told.totals["layer_bytes_after"] == other.totals["layer_bytes_after"]
    assert "kept dequantised for speed" in str(told) and "kept dequantised for speed" in told.to_markdown()
    assert not other.totals["layer_bytes_kept"] and "for speed" not in str(other)


@pytest.mark.parametrize("recipe", WISHES)
def test_reverting_lets_go_of_it(recipe: str, from_16_rows: None):
    gc.collect()
    before, model, x = packed_bytes(), converted(recipe), torch.randn(64, 256)
    kept = tw.report(model).totals["layer_bytes_kept"]
    with torch.inference_mode():
        for _ in range(3):
            y = model(x)
        assert packed_bytes() - before >= kept > 0
        reverted = tw.revert_model(model, inplace=True)
        gc.collect()
        assert packed_bytes() <= before and isinstance(reverted[0], nn.Linear)
        assert (reverted(x) - y).norm() <= 0.02 * y.norm()


@pytest.mark.parametrize("kind, recipe", [(Int4Linear, "int4"), (Int8WeightOnlyLinear, "int8-weight-only")])
def test_files_hold_the_wish_alone(kind: type, recipe: str, tmp_path: Path, from_16_rows: None):
    model, plain, x = converted(recipe), tw.convert_model(network(), recipe, fuse=False), torch.randn(64, 256)
    with torch.inference_mode():
        for _ in range(3):
            y = model(x)
    tw.save_model(model, tmp_path / "kept")
    tw.save_model(plain, tmp_path / "plain")
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in ("kept", "plain")]
    assert sizes[0] == sizes[1] and list(model.state_dict()) == list(plain.state_dict())
    loaded = tw.load_model(tmp_path / "kept", network)
    assert isinstance(loaded[0], kind) and loaded[0].keep_dequantized
    assert tw.report(loaded).totals["layer_bytes_kept"] == tw.report(model).totals["layer_bytes_kept"]
    for other in (loaded, copy.deepcopy(model)):
        with torch.inference_mode():
            for _ in range(3):
                assert torch.equal(other(x), y)
