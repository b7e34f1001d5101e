"""What other libraries put on a model: accelerate's hooks, PEFT's adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tilewright.convert import convert_model
from tilewright.nn import QuantizedLinear


def test_hooks_of_accelerate_are_named_with_the_way_out() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = accelerate.cpu_offload(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), execution_device="cpu")
    with pytest.raises(ValueError, match=r"accelerate\.hooks\.remove_hook_from_module\(model, recurse=True\) first"):
        convert_model(model, "int8")
    convert_model(accelerate.hooks.remove_hook_from_module(model, recurse=True), "int8")


def test_adapters_are_added_first() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch.manual_seed(0)
    model, config = nn.Sequential(nn.Linear(64, 64)), peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    with pytest.raises(ValueError, match="Int8Linear.* is not supported"):  # PEFT's words
        peft.get_peft_model(convert_model(model, "int8"), config)
    adapted, x = peft.get_peft_model(model, config).eval(), torch.randn(3, 64)
    expected = adapted(x)
    assert (convert_model(adapted, "int8")(x) - expected).norm() < 0.02 * expected.norm()


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


def decibels(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Signal over error."""
    return float(10 * (expected.square().sum() / (expected - actual).square().sum()).log10())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("recipe, least", [("int8", 28.0), ("w8a16", 28.0), ("int4-g32", 10.0), ("w4a8-g32", 10.0)])
@torch.no_grad()
def test_an_adapter_merges_into_converted_layers_and_out_again(recipe: str, least: float, options: Any) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["up", "down"], init_lora_weights=False, **options)
    model, x = peft.get_peft_model(Perceptron(), lora).eval(), torch.randn(32, 64)
    adapted = model(x)
    with model.disable_adapter():
        plain = model(x)
    assert decibels(adapted, plain) < 10, "the adapter does something"
    converted = convert_model(model, recipe)
    assert decibels(adapted, converted(x)) > least
    codes = converted.base_model.model.up.base_layer.weight.clone()
    for safe in (False, True):
        merged = copy.deepcopy(converted)
        merged.merge_adapter(safe_merge=safe)
        assert not torch.equal(merged.base_model.model.up.base_layer.weight, codes)
        assert decibels(adapted, merged(x)) > least
        with merged.disable_adapter():
            assert decibels(plain, merged(x)) > least - 6  # it was rounded three times
        merged.unmerge_adapter()
        assert decibels(adapted, merged(x)) > least - 6
    alone = converted.merge_and_unload()
    assert isinstance(alone.up, QuantizedLinear)
    assert decibels(adapted, alone(x)) > least
