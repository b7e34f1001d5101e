"""PyTorch: float32 in eager mode, which all others are checked against, compiled by Inductor, and torchao's int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.missing import Missing
from bench.peers import networks
from bench.peers.contestants import Prepared
from bench.peers.floor import Counts, attention_operations
from bench.peers.floor import count as count_layers
from bench.peers.networks import DECODER
from bench.peers.work import Work

#: Tokens of one call of a decoder, one after the other.
STEPS = 16


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """logits [..., V] of the last position -> [V], with mean 0: what a decoder answers."""
    last = logits.reshape(-1, logits.shape[-1])[-1].float().log_softmax(0)
    return last - last.mean()


def inference(function: Callable[[], Any]) -> Callable[[], Any]:
    """``function`` without autograd."""

    def call() -> Any:
        with torch.inference_mode():
            return function()

    return call


def prepared(name: str, model: nn.Module, shape: tuple[int, ...], decode: bool) -> Prepared:
    """Calls of a PyTorch model, converted or not."""
    given = networks.inputs(name, shape)
    if name != DECODER:
        plain = networks.plain(name, model)
        return Prepared(inference(lambda: plain(*given)))
    if not decode:
        prompt = inference(lambda: model(given[0], use_cache=True, logits_to_keep=1).logits)
        return Prepared(prompt, lambda: log_probabilities(prompt()))
    return _steps(model, *given)


def _steps(model: nn.Module, prompt: torch.Tensor) -> Prepared:
    """Decoding at batch 1: after each call the cache holds the prompt again. What is answered is the distribution after
    the prompt's last token, decoded as a step behind the others.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    tokens = list(networks.inputs(DECODER, (1, STEPS), seed=2)[0].split(1, dim=1))

    def steps() -> torch.Tensor:
        for token in tokens:
            logits = model(token, past_key_values=cache, use_cache=True).logits
        return logits

    def back() -> None:
        cache.crop(prompt.shape[1] - 1 - cache.get_seq_length())  # by a negative number: so many tokens fewer

    with torch.inference_mode():
        model(prompt[:, :-1], past_key_values=cache, use_cache=True)
    last = inference(lambda: model(prompt[:, -1:], past_key_values=cache, use_cache=True).logits)
    return Prepared(inference(steps), lambda: log_probabilities(last()), inference(back), STEPS)


def eager(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """float32 as it is."""
    return prepared(name, networks.network(name), shape, decode)


def count(work: Work) -> Counts:
    """What the float32 model of this work multiplies and reads."""
    model = networks.network(work.model)
    if work.decode:
        model.config.use_cache = False
    given = networks.inputs(work.model, (1, 1) if work.decode else work.shape)
    plain = networks.plain(work.model, model)

    @torch.inference_mode()
    def call() -> torch.Tensor:
        return model(given[0], logits_to_keep=1).logits if work.model == DECODER else plain(*given)

    attention = attention_operations(work.model, work.shape, work.decode)
    return count_layers(model, call, attention, sum(value.numel() for value in given))


def _compiled(name: str, model: nn.Module, shape: tuple[int, ...]) -> Prepared:
    """By ``max-autotune`` for one shape, with frozen weights."""
    import torch._inductor.config as inductor

    compiled = torch.compile(networks.plain(name, model), mode="max-autotune", dynamic=False)
    given = networks.inputs(name, shape)
    found = Prepared(inference(lambda: compiled(*given)))
    # Inductor looks at the setting when it compiles, which is now; weights are frozen without autograd only.
    with inductor.patch(freezing=True):
        found.call()
    return found


def compiled(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """float32 through Inductor."""
    if name == DECODER:
        raise Missing("a growing cache is compiled anew for each length")
    return _compiled(name, networks.network(name), shape)


def torchao_int8(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """int8 weights, activations quantised on the fly, through Inductor; linear layers alone."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    # It replaces layers inside a model, not the model itself.
    model: Any = nn.Sequential(networks.network(name)) if " x " in name else networks.network(name)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return _compiled(name, model, shape)
