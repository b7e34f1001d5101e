"""The lines of a report add up to the model: over many architectures, and over the ways in which memory is shared."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from tests.convert.networks import Inception, SmallMobileNet, SmallResNet, settled
from tilewright.commands.report import of_manifest
from tilewright.convert.account import account_of
from tilewright.convert.checkpoint.manifest import read_manifest
from tilewright.convert.report import Report

transformers = pytest.importorskip("transformers", reason="most of the architectures are those of transformers")


# ---- what memory a model lies on, found in another way
def tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        own = {**vars(module), "_parameters": None, "_buffers": None}
        for value in own.values():
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from (each for each in value if isinstance(each, torch.Tensor))


def bytes_by_hand(model: nn.Module) -> int:
    """Sweep over all ends of tensors, sorted, and add up where at least one of them lies."""
    ends: list[tuple[int, int]] = []
    for tensor in tensors_of(model):
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            ends += [(tensor.data_ptr(), 1), (tensor.data_ptr() + last * tensor.element_size(), -1)]
    found = depth = 0
    for (place, step), (following, _) in itertools.pairwise([*sorted(ends), (0, 0)]):
        depth += step
        found += (following - place) * (depth > 0)
    return found


def check(report: Report, original: nn.Module, converted: nn.Module) -> None:
    assert report.model_bytes_after == bytes_by_hand(converted)
    assert report.model_bytes_before == bytes_by_hand(original)
    others = sum(other.bytes for other in report.others)
    assert report.model_bytes_after == sum(layer.bytes_after for layer in report.layers) + others
    assert report.model_bytes_before == sum(layer.bytes_before for layer in report.layers) + others
    names = [part.name for part in (*report.layers, *report.others)]
    assert len(names) == len(set(names))
    assert all(layer.scheme or layer.reason for layer in report.layers)
    assert all(other.reason and other.what and other.bytes > 0 for other in report.others)


# ---- architectures
TEXT = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
GROUPED = {**TEXT, "num_key_value_heads": 2}
VISION = {**TEXT, "image_size": 32, "patch_size": 16}
VISION.pop("vocab_size")
BART = {"vocab_size": 96, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
SPEECH = {**TEXT, "conv_dim": (32, 32), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_conv_pos_embeddings": 16}
SPEECH |= {"num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2}
TWO = {"text_config": {**TEXT, "max_position_embeddings": 32}, "vision_config": VISION, "projection_dim": 32}

#: model_type, class of the model, options of its configuration.
FAMILIES: list[tuple[str, str, dict[str, Any]]] = [
    ("mixtral", "AutoModelForCausalLM", {**GROUPED, "num_local_experts": 8}),
    ("qwen3_moe", "AutoModelForCausalLM", {**GROUPED, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16}),
    ("gpt_oss", "AutoModelForCausalLM", {**GROUPED, "num_local_experts": 4, "head_dim": 16}),
    ("granitemoe", "AutoModelForCausalLM", {**GROUPED, "num_local_experts": 4}),
    ("olmoe", "AutoModelForCausalLM", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    ("gpt2", "AutoModelForCausalLM", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    ("gpt_neox", "AutoModelForCausalLM", TEXT),
    ("opt", "AutoModelForCausalLM", {**TEXT, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    ("bloom", "AutoModelForCausalLM", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    ("llama", "AutoModelForCausalLM", GROUPED),
    ("qwen2", "AutoModelForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    ("gemma2", "AutoModelForCausalLM", {**GROUPED, "head_dim": 16}),
    ("phi3", "AutoModelForCausalLM", {**GROUPED, "pad_token_id": 0}),
    ("mamba", "AutoModelForCausalLM", {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2}),
    ("mamba2", "AutoModelForCausalLM", {**TEXT, "num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16}),
    ("falcon_mamba", "AutoModelForCausalLM", {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2}),
    ("rwkv", "AutoModelForCausalLM", {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2}),
    ("bert", "AutoModelForMaskedLM", TEXT),
    ("roberta", "AutoModelForMaskedLM", TEXT),
    ("albert", "AutoModel", {**TEXT, "embedding_size": 32}),
    ("distilbert", "AutoModel", {"vocab_size": 96, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}),
    ("electra", "AutoModel", {**TEXT, "embedding_size": 32}),
    ("deberta-v2", "AutoModel", TEXT),
    ("modernbert", "AutoModel", {**TEXT, "pad_token_id": 0}),
    ("t5", "AutoModelForSeq2SeqLM", T5),
    ("bart", "AutoModelForSeq2SeqLM", BART),
    ("marian", "AutoModelForSeq2SeqLM", {**BART, "pad_token_id": 0, "decoder_start_token_id": 0}),
    ("whisper", "AutoModelForSpeechSeq2Seq", {**BART, "pad_token_id": 0, "max_source_positions": 32}),
    ("wav2vec2", "AutoModel", SPEECH),
    ("hubert", "AutoModel", SPEECH),
    ("vit", "AutoModelForImageClassification", VISION),
    ("dinov2", "AutoModel", VISION),
    ("deit", "AutoModel", VISION),
    ("swin", "AutoModel", {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4]}),
    ("convnext", "AutoModel", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}),
    ("resnet", "AutoModel", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}),
    ("clip", "AutoModel", TWO),
    ("siglip", "AutoModel", TWO),
]
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.ModuleDict({"rnn": nn.LSTM(64, 64, 2, bidirectional=True), "out": nn.Linear(128, 64)}),
    "gru": lambda: nn.ModuleDict({"rnn": nn.GRU(64, 64), "cell": nn.GRUCell(8, 8), "fc": nn.Linear(64, 64)}),
    "multihead-attention": lambda: nn.ModuleList([nn.MultiheadAttention(64, 4, kdim=32, vdim=16), nn.Linear(64, 64)]),
    "transformer": lambda: nn.Transformer(64, 4, 2, 2, 96, batch_first=True),
    "transformer-encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 2),
    "residual-network": lambda: settled(SmallResNet()),
    "mobile-network": lambda: settled(SmallMobileNet()),
    "inception": lambda: settled(Inception()),
    "volumes": lambda: nn.Sequential(nn.Conv3d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2), nn.PReLU(4), nn.Linear(64, 64)),
    "bilinear": lambda: nn.ModuleList([nn.Bilinear(8, 8, 4), nn.EmbeddingBag(9, 8), nn.Linear(64, 64)]),
}


def family(kind: str, auto: str, options: dict[str, Any]) -> nn.Module:
    return getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind, **options))


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{
        kind: lambda kind=kind, auto=auto, options=options: family(kind, auto, options)
        for kind, auto, options in FAMILIES
    },
    **PLAIN,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_lines_add_up_to_the_model(name: str, tmp_path: Path) -> None:
    model = MODELS[name]().eval()
    check(tw.report(model), model, model)
    converted = tw.convert_model(model, "int8")
    made = tw.report(converted)
    check(made, model, converted)
    tw.save_model(converted, tmp_path)
    saved = of_manifest(made.model, read_manifest(tmp_path))
    assert saved.totals == made.totals
    told = [{(o.name, o.kind, o.what, o.bytes, o.reason) for o in report.others} for report in (made, saved)]
    assert told[0] == told[1]


# ---- what is said
def lines_of(model: nn.Module, recipe: str = "int8") -> dict[str, tuple[str, int]]:
    """What lies outside of layers: name -> what it is, and its bytes."""
    return {each.name: (each.what, each.bytes) for each in tw.report(tw.convert_model(model, recipe)).others}


def test_every_kind_of_tensor_is_told_by_its_name() -> None:
    lines = lines_of(MODELS["mixtral"]().eval())
    experts = "model.layers.1.mlp.experts"
    assert lines[f"{experts}.gate_up_proj"] == ("fused experts", 4 * 8 * 2 * 96 * 64)
    assert lines[f"{experts}.down_proj"] == ("fused experts", 4 * 8 * 64 * 96)
    assert lines["model.layers.1.mlp.gate.weight"] == ("parameters", 4 * 8 * 64)
    assert lines["model.embed_tokens"] == ("embeddings", 4 * 96 * 64)
    assert lines["model.layers.0.input_layernorm"] == ("norms", 4 * 64)
    assert lines["model.rotary_emb.inv_freq"] == ("buffers", 4 * 8)
    assert lines_of(PLAIN["lstm"]())["rnn"][0] == "recurrent layers"
    attention = lines_of(PLAIN["multihead-attention"]())
    assert attention["0"] == ("attention weights", 4 * (64 * 64 + 64 * 32 + 64 * 16 + 3 * 64))
    assert lines_of(PLAIN["residual-network"](), "fuse") == {}  # batch-norms are part of the convolutions


@pytest.mark.parametrize(
    "name, line",
    [
        ("mixtral", "less than half of the model's bytes were converted (7 %): 89 % are fused experts"),
        ("bilinear", "93 % of the model's bytes were converted"),
        ("lstm", "less than half of the model's bytes were converted (5 %): 95 % are recurrent layers"),
        (
            "transformer",
            "less than half of the model's bytes were converted (33 %): 50 % are attention weights, "
            "17 % are layers left alone",
        ),
    ],
)
def test_the_headline_says_the_share_of_the_bytes(name: str, line: str) -> None:
    made = tw.report(tw.convert_model(MODELS[name]().eval(), "int8"))
    assert made.headlines()[1] == line
    assert made.totals["converted_share"] == made.totals["layer_bytes_before"] / made.model_bytes_before
    for text in (" ".join(str(made).split()), made.to_markdown()):
        assert all(f"{what}, " in text and reason in text for what, reason in {(o.what, o.reason) for o in made.others})


def test_text_names_what_lies_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    made = tw.report(tw.convert_model(MODELS["mixtral"]().eval(), "int8"))
    lines = str(made).splitlines()
    row = lines.index(
        "fused experts, 1.1 MiB: one Parameter holds the weights of all experts; only layers are converted"
    )
    assert lines[row + 1] == "    model.layers.*.mlp.experts.gate_up_proj x2, model.layers.*.mlp.experts.down_proj x2"
    assert "    model.layers.1.mlp.experts.gate_up_proj" in "\n".join(lines_of_details(made))
    read = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert (
        sum(each["bytes"] for each in read["others"] + [{"bytes": x["bytes_after"]} for x in read["layers"]])
        == (read["totals"]["model_bytes_after"])
    )


def lines_of_details(report: Report) -> list[str]:
    """With a name on each line."""
    return report.details().replace(", ", "\n    ").splitlines()


# ---- ways in which memory is held
class Kept(nn.Module):
    """A tensor in each place that a module has for one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.vector = nn.Parameter(torch.randn(64))
        self.register_buffer("table", torch.randn(10, 64))
        self.register_buffer("mask", torch.ones(12, 12, dtype=torch.bool), persistent=False)
        self.plain = torch.randn(7)
        self.several = [torch.randn(3), {"key": (torch.randn(5),)}]
        self.same = [self.plain, self.weight.detach(), self.table[2:]]
        self.nothing = torch.empty(0)


def test_every_place_of_a_module_counts_once() -> None:
    assert lines_of(Kept()) == {
        "weight": ("parameters", 4 * 64 * 64),
        "vector": ("parameters", 4 * 64),
        "table": ("buffers", 4 * 640),
        "mask": ("buffers", 144),
        "plain": ("tensor attributes", 28),
        "several": ("tensor attributes", 32),
    }


def sharing(how: str) -> nn.Module:
    first, second, third = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
    flat = torch.randn(6, 64, 64)
    if how == "bias":
        second.bias = first.bias
    elif how == "neighbours":
        first.weight, second.weight = nn.Parameter(flat[1]), nn.Parameter(flat[2])
    elif how == "columns":
        wide = torch.randn(64, 128)
        first.weight, second.weight = nn.Parameter(wide[:, :64]), nn.Parameter(wide[:, 64:])
    elif how == "weight":
        second.weight = first.weight
    elif how == "half":
        second.weight = nn.Parameter(first.weight.data[:32])
    elif how == "module":
        second = first
    embedding = nn.Embedding(96, 64)
    if how == "embedding":
        second.weight, second.bias = nn.Parameter(embedding.weight.data[16:80]), None
    return nn.ModuleDict({"first": first, "embedding": embedding, "second": second, "third": third})


HOW = ("nothing", "bias", "neighbours", "columns", "weight", "half", "module", "embedding")


@pytest.mark.parametrize("how", HOW)
def test_shared_memory_counts_once(how: str) -> None:
    model = sharing(how)
    check(tw.report(model), model, model)
    converted = tw.convert_model(model, "int8")
    check(tw.report(converted), model, converted)


def test_what_is_tied_is_counted_where_it_comes_first() -> None:
    held = account_of(sharing("weight")).layers
    assert held == {"first": 4 * (64 * 64 + 64), "second": 4 * 64, "third": 4 * (64 * 64 + 64)}
    assert account_of(sharing("half")).shared == {"first": 0, "second": 4 * 32 * 64, "third": 0}


def test_expanded_and_sparse_tensors_count_what_they_lie_on() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    model.register_buffer("wide", torch.zeros(8, 1).expand(8, 1000))
    model.register_buffer("coordinates", torch.eye(6).to_sparse())
    model.register_buffer("rows", torch.eye(6).to_sparse_csr())
    model.register_buffer("elsewhere", torch.zeros(9, device="meta"))
    assert {name: size for name, (_, size) in lines_of(model).items()} == {
        "wide": 4 * 8,
        "coordinates": 2 * 6 * 8 + 6 * 4,
        "rows": 7 * 8 + 6 * 8 + 6 * 4,
        "elsewhere": 4 * 9,
    }


def test_a_scripted_child_is_named() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)))
    made = tw.report(tw.convert_model(nn.ModuleDict({"a": scripted, "b": nn.Linear(64, 64)}), "int8"))
    assert [(other.name, other.what, other.bytes) for other in made.others] == [
        ("a.0", "scripted modules", 4 * 33 * 32),
        ("a.1", "scripted modules", 4 * 4 * 32 + 8),
    ]
    assert "convert the module it was scripted from" in made.others[0].reason


def test_a_tensor_of_a_subclass_counts_what_it_holds() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Sequential(nn.Linear(64, 64))
    model.pair = nn.Parameter(TwoTensor(torch.zeros(4, 4), torch.zeros(4, 4)))
    assert lines_of(model)["pair"] == ("parameters", 2 * 4 * 16)


def test_a_model_that_changed_after_its_conversion_still_adds_up() -> None:
    model = MODELS["llama"]().eval()
    converted = tw.convert_model(model, "int8")
    embedding = converted.get_input_embeddings()
    converted.set_input_embeddings(nn.Embedding(2 * embedding.num_embeddings, embedding.embedding_dim))
    converted.model.extra = nn.Linear(64, 64)
    made = tw.report(converted.half())
    assert made.model_bytes_after == bytes_by_hand(converted)
    assert {layer.name: layer.reason for layer in made.skipped}["model.extra"] == "not converted"


def test_a_folder_that_tells_nothing_of_what_lies_outside_adds_up_too(tmp_path: Path) -> None:
    model = tw.convert_model(MODELS["bert"]().eval(), "int8")
    tw.save_model(model, tmp_path)
    path = tmp_path / "tilewright.json"
    manifest = json.loads(path.read_text())
    assert manifest["record"].pop("others")
    path.write_text(json.dumps(manifest))
    saved, made = of_manifest("BertForMaskedLM", read_manifest(tmp_path)), tw.report(model)
    assert saved.totals == made.totals
    names = {other.name: other.what for other in saved.others}
    assert names["bert.embeddings.word_embeddings.weight"] == "parameters"
    assert names["bert.embeddings.position_ids"] == "buffers"


@pytest.mark.parametrize("others", [[], {"a": {}}, {"a": {"kind": "", "what": 3, "reason": ""}}, {"a": {"x": ""}}, 3])
def test_a_folder_that_tells_nonsense_is_damaged(others: Any, tmp_path: Path) -> None:
    tw.save_model(tw.convert_model(nn.Sequential(nn.Linear(64, 64)), "int8"), tmp_path)
    path = tmp_path / "tilewright.json"
    manifest = json.loads(path.read_text())
    manifest["record"]["others"] = others
    path.write_text(json.dumps(manifest))
    with pytest.raises(tw.CheckpointError, match=r"tilewright.json: damaged"):
        read_manifest(tmp_path)
