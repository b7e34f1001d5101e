"""Modules that read the weights of their layers instead of calling them work on converted layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
from tilewright.convert.layers import is_converted
from tilewright.nn import ConvLayer, FusedActivation, QuantizedLinear


def decibels(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Signal over error."""
    noise = float((expected.double() - actual.double()).pow(2).sum())
    return 999.0 if noise == 0 else 10 * math.log10(float(expected.double().pow(2).sum()) / noise)


class WindowAttention(nn.Module):
    """As torchvision's Swin has it: the function gets the weights."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        y = F.linear(F.scaled_dot_product_attention(q, k, v), self.proj.weight, self.proj.bias)
        return y + self.down(self.act(self.up(y)))


class Perceptron(nn.Module):
    """Multiplies with a weight where it is called for a single row."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(F.linear(x, self.up.weight, self.up.bias)))


class ReadAndCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Perceptron()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp.step(x) if x.shape[1] == 1 else self.mlp(x)


class Mixer(nn.Module):
    """A causal convolution that is called for a sequence and read for a step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(32, 32, 4, groups=32, padding=3)
        self.out = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.conv1d(x.transpose(1, 2))[..., : x.shape[1]]
        state = F.pad(x.transpose(1, 2), (4 - 1, 0))[..., -4:]
        step = (state * self.conv1d.weight[:, 0, :]).sum(-1) + self.conv1d.bias
        again = F.conv1d(state, self.conv1d.weight, self.conv1d.bias, groups=32)[..., 0]
        return self.out(rows.transpose(1, 2)) + self.out(step).unsqueeze(1) - self.out(again).unsqueeze(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe, least", [("int8", 25.0), ("int4-g32", 12.0), ("w4a8-g32", 12.0), ("fuse", 40.0)])
@pytest.mark.parametrize("build", [WindowAttention, ReadAndCalled, Mixer])
@torch.no_grad()
def test_a_module_that_reads_its_layers(build: Callable[[], nn.Module], recipe: str, least: float, dtype: Any) -> None:
    torch.manual_seed(0)
    model, x = build().to(dtype).eval(), torch.randn(2, 7, 32, dtype=dtype)
    if recipe == "fuse" and build is not Mixer:
        pytest.skip("it has no convolution")
    expected = model(x)
    converted = tw.convert_model(model, recipe, calibration_data=[x])
    for _ in range(3):
        assert decibels(expected, converted(x)) > least
    assert decibels(expected, tw.revert_model(converted)(x)) > least


@torch.no_grad()
def test_an_activation_stays_where_the_weight_before_it_is_read() -> None:
    """What reads the weight does not get the activation. Only a call shows that."""
    torch.manual_seed(0)
    model, x = ReadAndCalled().eval(), torch.randn(2, 7, 32)
    assert isinstance(tw.convert_model(model, "int8", example_inputs=x).mlp.act, FusedActivation)
    converted = tw.convert_model(model, "int8", calibration_data=[x[:, :1]], example_inputs=x)
    assert isinstance(converted.mlp.act, nn.GELU) and converted.mlp.up.activation == "none"
    assert {layer.name: layer.scheme for layer in tw.report(converted).layers}["mlp.up"] == "w8a8"
    for rows in (x, x[:, :1]):
        assert decibels(model(rows), converted(rows)) > 30


@torch.no_grad()
def test_it_survives_saving_and_compiling(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 32)
    for build, recipe in ((WindowAttention, "int8"), (Mixer, "fuse")):
        model = tw.convert_model(build().eval(), recipe)
        expected = model(x)
        tw.save_model(model, tmp_path / recipe)
        loaded = tw.load_model(tmp_path / recipe, build)
        assert torch.equal(loaded(x), expected) and torch.equal(copy.deepcopy(model)(x), expected)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


# ---- families of transformers
transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "intermediate_size": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SCAN = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
DELTA = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": {},
    "falcon_mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "jamba": {**HEADS, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    "lfm2": {**HEADS, "layer_types": ["conv", "full_attention"]},
    "bamba": {**HEADS, **SCAN, "attn_layer_indices": [1]},
    "nemotron_h": {
        **HEADS,
        "hybrid_override_pattern": "M*",
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
    },
    "granitemoehybrid": {**HEADS, **SCAN, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    "qwen3_next": {**HEADS, **DELTA, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64},
    "qwen3_5_text": {**HEADS, **DELTA},
}
IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", FAMILIES)
@torch.inference_mode()
def test_mixers_with_a_causal_convolution(kind: str, dtype: torch.dtype, request: Any) -> None:
    torch.manual_seed(0)
    try:
        config = transformers.AutoConfig.for_model(kind, **SIZES, **FAMILIES[kind])
    except ValueError as error:
        pytest.skip(f"this version of transformers has no {kind}: {str(error)[:60]}")
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)]
    expected = model(IDS).logits
    for recipe, least in (("int8", 25.0), ("fuse", 40.0)):
        converted = tw.convert_model(model, recipe)
        for _ in range(2):
            assert decibels(expected, converted(IDS).logits) > least
        assert convolutions and all(isinstance(converted.get_submodule(name), ConvLayer) for name in convolutions)
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        cached = converted.generate(IDS, **options)
        assert torch.equal(cached, converted.generate(IDS, use_cache=False, **options))


@torch.no_grad()
def test_encoders_that_cast_pixels_to_the_dtype_of_a_convolution() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    image = {"image_size": 32, "patch_size": 8}
    x = torch.randn(2, 3, 32, 32)
    for build in (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, **image)),
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, **image)),
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**sizes, **image, mlp_ratio=2)),
    ):
        model = build().eval()
        expected = model(x).last_hidden_state
        for recipe in ("int8", "fuse", "int4-g32"):
            converted = tw.convert_model(model, recipe, calibration_data=[{"pixel_values": x}])
            assert decibels(expected, converted(x).last_hidden_state) > (12 if recipe == "int4-g32" else 30)
            assert any(is_converted(module) for module in converted.modules())


@torch.no_grad()
def test_a_model_that_rescales_its_weights() -> None:
    """RWKV divides some of them before its first call in eval mode, and multiplies them back for training."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "attention_hidden_size": 64, "intermediate_size": 128}
    config = transformers.RwkvConfig(**sizes, context_length=32, num_hidden_layers=4, rescale_every=2)
    model = transformers.RwkvForCausalLM(config).eval()
    expected = copy.deepcopy(model)(IDS).logits
    for recipe, least in (("int8", 25.0), ("int4-g32", 10.0)):
        converted = tw.convert_model(model, recipe)
        before = converted.rwkv.blocks[2].attention.output.weight.clone()
        assert isinstance(converted.rwkv.blocks[2].attention.output, QuantizedLinear)
        for _ in range(2):
            assert decibels(expected, converted(IDS).logits) > least
            torch.testing.assert_close(converted.rwkv.blocks[2].attention.output.weight.clone(), before / 2)
        converted.train()(IDS)
        torch.testing.assert_close(converted.rwkv.blocks[2].attention.output.weight.clone(), before)
        assert decibels(expected, converted.eval()(IDS).logits) > least
