"""Models of Hugging Face transformers, tiny and with random weights: everything converts or says why not."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tilewright.convert import convert_model, load_model, report, revert_model, save_model
from tilewright.convert.layers import is_converted, is_linear

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {"vocab_size": 96, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
IDS = torch.arange(2, 26).reshape(2, 12)
MASK = torch.ones(2, 12, dtype=torch.long)
MASK[1, 7:] = 0


@dataclass(frozen=True)
class Architecture:
    """build: the model from a config. inputs, output: sample arguments and the name of the tensor to compare.

    skipped: layers left alone, with words of the reason.
    """

    build: Callable[[], nn.Module]
    inputs: dict[str, torch.Tensor]
    output: str
    skipped: dict[str, str]


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, **TEXT))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    )


def llama(tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, **TEXT, num_key_value_heads=2, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def qwen2() -> nn.Module:
    config = transformers.Qwen2Config(**SMALL, **TEXT, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.Qwen2ForCausalLM(config)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=32, patch_size=8))


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=96,
        num_mel_bins=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        d_model=64,
        max_source_positions=20,
        max_target_positions=20,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        decoder_start_token_id=0,
    )
    return transformers.WhisperForConditionalGeneration(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=2
    )
    return transformers.T5ForConditionalGeneration(config)


IDS_AND_MASK = {"input_ids": IDS, "attention_mask": MASK}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)}
SOUND = {"input_features": torch.linspace(-9, 9, 2 * 16 * 40).sin().reshape(2, 16, 40), "decoder_input_ids": IDS}
ARCHITECTURES = {
    "bert": Architecture(bert, IDS_AND_MASK, "logits", {"cls.predictions.decoder": "tied to bert.embeddings.word"}),
    "gpt2": Architecture(gpt2, IDS_AND_MASK, "logits", {"lm_head": "tied to transformer.wte"}),
    "llama": Architecture(llama, IDS_AND_MASK, "logits", {"lm_head": "output head"}),
    "qwen2": Architecture(qwen2, IDS_AND_MASK, "logits", {"lm_head": "tied to model.embed_tokens"}),
    "vit": Architecture(vit, PIXELS, "logits", {"classifier": "output head"}),
    "whisper": Architecture(whisper, SOUND, "logits", {"proj_out": "tied to model.decoder.embed_tokens"}),
    "t5": Architecture(t5, {"input_ids": IDS, "decoder_input_ids": IDS}, "logits", {"lm_head": "tied to|output head"}),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ARCHITECTURES[name].build().eval()


def run(name: str, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return getattr(model(**ARCHITECTURES[name].inputs), ARCHITECTURES[name].output)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


@pytest.mark.parametrize("recipe, least", [("int8", 0.999), ("int4-g32", 0.97), ("int8-int4-g32", 0.96)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_converts_with_every_layer_accounted_for(name: str, recipe: str, least: float) -> None:
    model = made(name)
    converted = convert_model(model, recipe)
    layers = {layer.name: layer for layer in report(converted).layers}
    linear = [n for n, module in model.named_modules() if is_linear(module)]
    convolutions = [n for n, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)]
    assert sorted([*linear, *convolutions]) == sorted(layers)
    assert len(linear) > 5
    for name_of_convolution in convolutions:
        convolution = layers.pop(name_of_convolution)
        assert ("fuse" in convolution.scheme) == (recipe == "int8")
        assert ("needs calibration_data" if recipe == "int8" else "takes linear layers") in convolution.reason
    for layer in layers.values():
        assert bool(layer.scheme) != bool(layer.reason)
    expected_skips = ARCHITECTURES[name].skipped
    skipped = {layer.name: layer.reason for layer in layers.values() if not layer.scheme}
    assert skipped.keys() == expected_skips.keys()
    for layer_name, reason in expected_skips.items():
        assert any(part in skipped[layer_name] for part in reason.split("|"))
    assert cosine(run(name, converted), run(name, model)) > least


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_copy_state_dict_and_revert(name: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model = made(name)
    converted = convert_model(model, "int8")
    expected = run(name, converted)
    assert torch.equal(run(name, copy.deepcopy(converted)), expected)
    state = safetensors.save({k: v.clone() for k, v in converted.state_dict().items()})
    fresh = convert_model(ARCHITECTURES[name].build().eval(), "int8")
    fresh.load_state_dict(safetensors.load(state))
    assert torch.equal(run(name, fresh), expected)
    reverted = revert_model(converted)
    assert [(n, type(m)) for n, m in reverted.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    assert {n: t.shape for n, t in reverted.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert cosine(run(name, reverted), run(name, model)) > 0.999


@pytest.mark.parametrize("recipe", ["int8", "int4-g32"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_save_and_load(name: str, recipe: str, tmp_path: Path) -> None:
    converted = convert_model(made(name), recipe)
    save_model(converted, tmp_path)
    loaded = load_model(tmp_path, ARCHITECTURES[name].build)
    assert not loaded.training
    assert torch.equal(run(name, loaded), run(name, converted))
    assert {n: b.dtype for n, b in loaded.named_buffers()} == {n: b.dtype for n, b in converted.named_buffers()}
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), converted.buffers(), strict=True))


def test_tied_embeddings_stay_tied_through_a_checkpoint(tmp_path: Path) -> None:
    converted = convert_model(llama(tied=True).eval(), "int8")
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    save_model(converted, tmp_path)
    loaded = load_model(tmp_path, lambda: llama(tied=True))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(IDS).logits, converted(IDS).logits)


def test_conv1d_keeps_its_attributes_and_values() -> None:
    model = made("gpt2")
    conv1d = model.transformer.h[0].mlp.c_fc
    converted = convert_model(model, "int8")
    layer = converted.transformer.h[0].mlp.c_fc
    assert (layer.origin, layer.nf, layer.nx) == ("Conv1D", conv1d.nf, conv1d.nx) == ("Conv1D", 256, 64)
    assert layer.bias is conv1d.bias
    back = revert_model(converted).transformer.h[0].mlp.c_fc
    assert type(back) is type(conv1d) and back.weight.is_contiguous()
    error = torch.linalg.vector_norm(back.weight - conv1d.weight) / torch.linalg.vector_norm(conv1d.weight)
    assert error < 0.01


def test_a_head_that_is_not_tied_converts_when_asked() -> None:
    for options in ({"heads": True}, {"recipe": {"lm_head": "int8", "*": "int4-g32"}}):
        converted = convert_model(made("llama"), **options)
        assert is_converted(converted.lm_head)
        assert torch.isfinite(run("llama", converted)).all()


@pytest.mark.parametrize("name", ["bert", "llama", "whisper"])
def test_calibration_with_model_inputs(name: str) -> None:
    model = made(name)
    converted = convert_model(model, "int8", calibration_data=ARCHITECTURES[name].inputs)
    assert all(layer.output_error is not None and layer.output_error < 0.03 for layer in report(converted).converted)
    assert cosine(run(name, converted), run(name, model)) > 0.999


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generation_goes_on_working(name: str) -> None:
    converted = convert_model(made(name), "int8")
    inputs: dict[str, Any] = {k: v for k, v in ARCHITECTURES[name].inputs.items() if not k.startswith("decoder")}
    produced = converted.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert produced.shape[0] == 2 and produced.shape[1] > 1


@pytest.mark.parametrize("recipe", ["int8", "int4-g32"])
def test_half_precision_t5_reads_the_dtype_of_its_layers(recipe: str) -> None:
    """T5 looks at ``wo.weight.dtype`` before it calls the layer, and casts what it passes to it."""
    model = made("t5").bfloat16()
    output = run("t5", convert_model(model, recipe))
    assert output.dtype == torch.bfloat16
    assert cosine(output, run("t5", model)) > (0.998 if recipe == "int8" else 0.96)


def test_whole_models_can_be_pickled() -> None:
    converted = convert_model(made("bert"), "int8")
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    assert torch.equal(run("bert", torch.load(buffer, weights_only=False)), run("bert", converted))
