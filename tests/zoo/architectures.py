"""Architectures of Hugging Face libraries: one row each, with small sizes and the inputs that it is called on."""

from __future__ import annotations

import copy
import fnmatch
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One architecture.

    model: name of the class. config: arguments of its configuration; what is itself a mapping stays one. inputs: makes
    the arguments of a call. generates: whether it writes text, token after token, with a cache. library: where the
    class lies. floors: by recipe, the signal over error that its answer has at least, where that is not what others
    have. jumps: whether an error of a few bits may choose another expert or another code.
    seed: of the weights. gains: by pattern of names, what weights are multiplied with, where the size of what they give
    matters. settles: whether its batch-norms have the statistics of data.
    """

    model: str
    config: Mapping[str, Any]
    inputs: Callable[[], Inputs]
    generates: bool = False
    library: str = "transformers"
    floors: Mapping[str, float] = field(default_factory=dict)
    jumps: bool = False
    seed: int = 0
    gains: Mapping[str, float] = field(default_factory=dict)
    settles: bool = True

    def build(self) -> nn.Module:
        """The model as its library makes it, in eval mode."""
        kind = getattr(importlib.import_module(self.library), self.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.library == "diffusers":
                model = kind(**self.config)
            else:
                model = kind(kind.config_class(**copy.deepcopy(dict(self.config))))
        return model.eval()

    def make(self) -> nn.Module:
        """The model, with weights at which every layer matters to the answer."""
        model = lively(self.build(), self.seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                for pattern, gain in self.gains.items():
                    if fnmatch.fnmatchcase(name, pattern):
                        parameter.mul_(gain)
        return settled(model, [lambda: model(**varied(self.inputs()))]) if self.settles else model


#: Words in the names of parameters that a branch is multiplied with, which start at nearly zero.
SCALES = ("scale", "gamma", "lambda", "grn")


def floors(int8: float, calibrated: float, weights: float, int4: float, w4a8: float) -> dict[str, float]:
    """``Row.floors`` for the recipes that quantise."""
    return {"int8": int8, "int8-calibrated": calibrated, "int8-weight-only": weights, "int4": int4, "w4a8": w4a8}


def lively(model: nn.Module, number: int = 0) -> nn.Module:
    """``model`` with weights that keep the size of what they multiply.

    Libraries start with weights so small that a residual stream hardly feels its layers: an answer would be right
    with half of them wrong. Parameters with a meaning of their own, such as the rates of a state space, stay.
    """
    seed = torch.Generator().manual_seed(1 + number)
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            with torch.no_grad():
                if isinstance(module, nn.Embedding):
                    parameter.normal_(0, 1, generator=seed)
                elif name == "weight" and parameter.dim() > 1 and parameter.numel() > max(parameter.shape):
                    fan_in = parameter[0].numel() if isinstance(module, layers) else parameter.shape[-1]
                    fan_in = len(parameter) if isinstance(module, _conv1d()) else fan_in
                    parameter.normal_(0, fan_in**-0.5, generator=seed)
                elif name == "bias":
                    parameter.normal_(0, 0.1, generator=seed)
                elif name == "weight" and parameter.dim() == 1:
                    parameter.add_(torch.rand(parameter.shape, generator=seed), alpha=0.2)
                elif parameter.numel() == max(parameter.shape, default=1) and any(
                    word in f"{type(module).__name__}.{name}".lower() for word in SCALES
                ):
                    parameter.uniform_(0.8, 1.2, generator=seed)
                elif parameter.dim() == 3 and ("proj" in name or name.startswith(("w1", "w2", "w3", "v1"))):
                    parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=seed)
    return model


def varied(inputs: Inputs) -> Inputs:
    """Four times the batch: two samples alone hardly have a variance."""
    ways: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: x,
        lambda x: 0.7 * x.flip(-1),
        lambda x: x.roll(5, -1) + 0.3,
        lambda x: -x,
    ]
    return {name: torch.cat([way(x) for way in ways]) for name, x in inputs.items()}


def is_scale(module: nn.Module, name: str) -> bool:
    full = f"{type(module).__name__}.{name}".lower()
    return any(word in full for word in SCALES)


def settled(model: nn.Module, calls: Iterable[Callable[[], Any]]) -> nn.Module:
    """``model`` with the statistics that its batch-norms find in ``calls``, as after training."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean of all calls
    with torch.no_grad():
        for call in calls if any(norm.training for norm in norms) else ():
            call()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return model


def _conv1d() -> tuple[type[nn.Module], ...]:
    """The linear layer of GPT-2, where its library is loaded."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return (loaded.Conv1D,) if loaded else ()


# ---- what models are called on
def wave(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Numbers that look random and are the same on every machine."""
    return scale * (torch.arange(torch.Size(shape).numel()) * 12.9898).sin().mul(43.7585).sin().reshape(shape)


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.arange(batch * length).mul(37).remainder(80).add(8).reshape(batch, length)


def ids() -> Inputs:
    return {"input_ids": tokens()}


def masked() -> Inputs:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0  # on the left, as models that write text want it
    return {"input_ids": tokens(), "attention_mask": mask}


def seq2seq() -> Inputs:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(2, 6)}


def pixels(size: int = 32, channels: int = 3, batch: int = 2) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": wave(batch, channels, size, size)}


def sound(length: int = 1600) -> Callable[[], Inputs]:
    return lambda: {"input_values": wave(2, length)}


def picture_and_text(size: int = 32) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": wave(2, 3, size, size), **masked()}


#: Names that most configurations share.
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {**SMALL, **TEXT, "num_key_value_heads": 2}
