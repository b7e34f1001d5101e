"""OpenVINO: a decoder whose cache of keys and values is state of the compiled model, with NNCF's int4 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as opset
from openvino import properties
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import nn

from bench.peers import networks
from bench.peers.contestants import Prepared
from bench.peers.pytorch import STEPS, log_probabilities

GROUP = 128


class WithCache(nn.Module):
    """A decoder as a function of tensors: keys and values come in, one of each a layer, and go out longer."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, beams: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """ids, positions int64 [1, Q]; mask float32 [1, 1, Q, K + Q], added to scores; beams int32 [1], of which
        sequence each is the continuation; past float32 [1, heads, K, size] -> logits [1, 1, V] and the longer ones.
        """
        from transformers import DynamicCache

        cache = DynamicCache(config=self.decoder.config)
        for layer, keys, values in zip(cache.layers, past[::2], past[1::2], strict=True):
            layer.lazy_initialization(keys, values)  # ``update`` would append to nothing, which has no shape
            layer.keys, layer.values = keys.index_select(0, beams), values.index_select(0, beams)
        found = self.decoder(
            ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return (found.logits, *(each for layer in cache.layers for each in (layer.keys, layer.values)))


def _stateful(name: str) -> Any:
    decoder: Any = networks.network(name)
    config = decoder.config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    past = [torch.zeros(1, heads, 3, size) for _ in range(2 * config.num_hidden_layers)]
    example = (torch.ones(1, 2, dtype=torch.int64), torch.tensor([[3, 4]]), torch.zeros(1, 1, 2, 5))
    with torch.no_grad():
        beams = torch.zeros(1, dtype=torch.int32)
        model = openvino.convert_model(WithCache(decoder.eval()), example_input=(*example, beams, *past))
    names = [*(f"past_{number}" for number in range(len(past)))]
    for place, shape in zip(model.inputs, [[1, -1], [1, -1], [1, 1, -1, -1], [1]], strict=False):
        place.get_node().set_partial_shape(openvino.PartialShape(shape))
    for place, known in zip(model.inputs[4:], names, strict=True):
        place.get_tensor().set_names({known})
        place.get_node().set_partial_shape(openvino.PartialShape([1, heads, -1, size]))
    for place, known in zip(model.outputs[1:], names, strict=True):
        place.get_tensor().set_names({f"{known}_longer"})
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {known: f"{known}_longer" for known in names})
    nothing = opset.broadcast(opset.constant(0.0, dtype=np.float32), opset.constant(np.array([1, heads, 0, size])))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":  # what it reads after a reset
            node.set_arguments([nothing.output(0)])
    model.validate_nodes_and_infer_types()
    return model


def _compressed(name: str, folder: Path) -> Any:
    import nncf

    path = folder / "decoder.int4.xml"
    if not path.exists():
        model = nncf.compress_weights(
            _stateful(name), mode=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP, ratio=1.0
        )
        openvino.save_model(model, path, compress_to_fp16=False)
    return openvino.Core().read_model(path)


def int4(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """Weights in groups of 128, symmetric, by ``compress_weights``, which leaves embedding and head in int8; else what
    OpenVINO does by itself: activations quantised on the fly, bfloat16 where the processor has it.
    """
    settings = {
        properties.hint.performance_mode(): properties.hint.PerformanceMode.LATENCY,
        properties.inference_num_threads(): threads,
    }
    request = openvino.Core().compile_model(_compressed(name, folder), "CPU", settings).create_infer_request()
    prompt = networks.inputs(name, shape)[0]
    tokens = list(networks.inputs(name, (1, STEPS), seed=2)[0].split(1, dim=1))

    def ask(ids: torch.Tensor, known: int) -> torch.Tensor:
        new = ids.shape[1]
        mask = torch.full((1, 1, new, known + new), torch.finfo(torch.float32).min).triu(known + 1)
        positions, beams = torch.arange(known, known + new)[None], torch.zeros(1, dtype=torch.int32)
        for place, value in enumerate((ids, positions, mask, beams)):
            request.set_input_tensor(place, openvino.Tensor(value.contiguous().numpy()))
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    def whole() -> torch.Tensor:
        request.reset_state()
        return ask(prompt, 0)

    def back() -> None:
        request.reset_state()
        ask(prompt[:, :-1], 0)

    def steps() -> torch.Tensor:
        for number, token in enumerate(tokens):
            logits = ask(token, prompt.shape[1] - 1 + number)
        return logits

    if not decode:
        return Prepared(whole, lambda: log_probabilities(whole()))
    back()
    return Prepared(steps, lambda: log_probabilities(ask(prompt[:, -1:], prompt.shape[1] - 1)), back, STEPS)
