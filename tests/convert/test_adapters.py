"""What other libraries put on a model: accelerate's hooks, PEFT's adapters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tilewright.convert import convert_model


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
