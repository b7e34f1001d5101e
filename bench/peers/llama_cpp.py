"""llama.cpp through the wheel xllamacpp: the same random Llama as GGUF, in Q4_0 and Q8_0, the head and embedding too.

Its server runs inside the process and reports the time of a prompt and of a token by its own clock, without HTTP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp
from gguf.quants import quantize

from bench.missing import Missing
from bench.peers import networks
from bench.peers.contestants import Prepared
from bench.peers.pytorch import STEPS

#: The value of the key "general.file_type" by format.
FILE_TYPES = {"Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
SPECIAL = ("<unk>", "<s>", "</s>")


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in llama.cpp's order: it rotates neighbours, transformers rotates halves."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _head(writer: Any, config: Any, format: str) -> None:
    """Sizes, and a vocabulary of made-up words: tokens are given by number."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(FILE_TYPES[format])
    known = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [*known, *(f"w{number}" for number in range(len(known), config.vocab_size))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 256
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (len(words) - len(known)))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write(model: Any, path: Path, format: str) -> None:
    """A Llama of transformers as a GGUF file whose matrices are in ``format``."""
    config, kind = model.config, gguf.GGMLQuantizationType[format]
    writer = gguf.GGUFWriter(str(path), "llama")
    _head(writer, config, format)

    def add(name: str, tensor: torch.Tensor) -> None:
        array = np.ascontiguousarray(tensor.detach().float().numpy())
        if array.ndim == 1:
            writer.add_tensor(f"{name}.weight", array)
        else:
            writer.add_tensor(f"{name}.weight", quantize(array, kind), raw_dtype=kind)

    add("token_embd", model.model.embed_tokens.weight)
    add("output_norm", model.model.norm.weight)
    add("output", model.lm_head.weight)
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for name, weight in {
            "attn_norm": layer.input_layernorm.weight,
            "attn_q": _interleaved(attention.q_proj.weight, config.num_attention_heads),
            "attn_k": _interleaved(attention.k_proj.weight, config.num_key_value_heads),
            "attn_v": attention.v_proj.weight,
            "attn_output": attention.o_proj.weight,
            "ffn_norm": layer.post_attention_layernorm.weight,
            "ffn_gate": mlp.gate_proj.weight,
            "ffn_up": mlp.up_proj.weight,
            "ffn_down": mlp.down_proj.weight,
        }.items():
            add(f"blk.{number}.{name}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _server(path: Path, threads: int) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = networks.DECODER_SIZES["max_position_embeddings"]
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.ui = False
    return xllamacpp.Server(parameters)


def _prepared(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int, format: str) -> Prepared:
    if name != networks.DECODER:
        raise Missing("llama.cpp runs decoders only")
    path = folder / f"{format}.gguf"
    if not path.exists():
        write(networks.network(name), path, format)
    server, prompt = _server(path, threads), networks.inputs(name, shape)[0][0].tolist()

    def ask(tokens: list[int], count: int, keep: bool, **more: object) -> dict[str, Any]:
        request = {"prompt": tokens, "n_predict": count, "cache_prompt": keep, "ignore_eos": True, "temperature": 0.0}
        found = server.handle_completions({**request, **more})
        if "timings" not in found:
            raise RuntimeError(f"llama.cpp answers {found}")
        return found

    def result() -> torch.Tensor:
        """Log-probabilities after the prompt; decoded as a step of its own behind the others where steps are timed."""
        if decode:
            ask(prompt[:-1], 1, keep=False)
        words = networks.DECODER_SIZES["vocab_size"]
        answer = ask(prompt, 1, keep=decode, n_probs=words)
        # Wheels of later builds answer as OpenAI's interface does.
        known = (
            answer["choices"][0]["logprobs"]["content"] if "choices" in answer else answer["completion_probabilities"]
        )
        found = known[0]["top_logprobs"]
        values = torch.full((words,), float("nan"))
        for one in found:
            values[one["id"]] = one["logprob"]
        return values - values.mean()

    def call() -> float:
        if decode:
            return ask(prompt, STEPS, keep=True)["timings"]["predicted_ms"] / 1e3
        return ask(prompt, 1, keep=False)["timings"]["prompt_ms"] / 1e3

    return Prepared(call, result, steps=STEPS if decode else 1, own_clock=True)


def q4_0(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """Four bits in groups of 32, activations in int8."""
    return _prepared(name, shape, decode, folder, threads, "Q4_0")


def q8_0(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """Eight bits in groups of 32, activations in int8."""
    return _prepared(name, shape, decode, folder, threads, "Q8_0")
