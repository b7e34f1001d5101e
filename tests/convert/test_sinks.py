"""Decoders whose attention has sinks: gpt-oss, with experts, and GraniteSWA, without."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright.convert.graph import attention, sinks
from tilewright.convert.network.blocks import states_of
from tilewright.kernels.cpu import native

transformers = pytest.importorskip("transformers", reason="needs transformers")
from tests.convert.test_decoders import agree, are_programs, by_layers, decoded, prompt  # noqa: E402

pytestmark = pytest.mark.skipif(native.why_no_native() is not None, reason=str(native.why_no_native()))

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 6,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "bos_token_id": 1,
    "eos_token_id": None,
    "intermediate_size": 96,
}
KINDS = {
    "GptOss": {**SIZES, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteSWA": SIZES,
}
GIVEN = {**prompt(padded=True), "input_ids": torch.arange(5, 19).view(2, 7)}


def small(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model_class = getattr(transformers, f"{kind}ForCausalLM", None)
    if model_class is None:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    options = KINDS[kind]
    if kind == "GptOss":  # the usual one reaches further than these positions
        options = {**options, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    model = model_class(model_class.config_class(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 1 if "norm" in name or "sinks" in name else 0.2)
    return model.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_theirs_is_ours_within_rounding(kind: str) -> None:
    model = small(kind)
    expected, _ = decoded(model, GIVEN)
    names = attention.use(model)
    assert names == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert model.config._attn_implementation == "eager"
    for y, wanted in zip(decoded(model, GIVEN)[0], expected, strict=True):
        torch.testing.assert_close(y, wanted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks += 3.0
    away = decoded(model, GIVEN)[0]
    assert (away[0] - expected[0]).abs().max() > 0.05, "the sinks count"
    attention.restore(model)
    for y, wanted in zip(decoded(model, GIVEN)[0], away, strict=True):
        torch.testing.assert_close(y, wanted, atol=1e-4, rtol=1e-4)


def test_it_is_called() -> None:
    model = tw.convert_model(small("GptOss"), "int8")
    with torch.profiler.profile() as profile:
        decoded(model, GIVEN, 1)
    assert "tilewright::attention" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_one_is_a_program_with_its_sinks(dtype: torch.dtype) -> None:
    model = tw.convert_model(small("GraniteSWA", dtype), "int8")
    expected, theirs = decoded(by_layers(model), GIVEN)
    found, mine = decoded(model, GIVEN)
    agree(found, expected)
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    assert are_programs(model, "1 C call" if dtype == torch.float32 else "2 C calls")


def written(model: nn.Module) -> None:
    with torch.no_grad():
        model.model.layers[1].self_attn.sinks += 2.0


def replaced(model: nn.Module) -> None:
    part = model.model.layers[1].self_attn
    part.sinks = nn.Parameter(part.sinks.detach() + 2.0)


def chosen(model: nn.Module) -> None:
    model.config._attn_implementation = "flex_attention"
    model.config._attn_implementation = "eager"


@pytest.mark.parametrize("change", [written, replaced, chosen], ids=lambda change: change.__name__)
def test_what_was_changed_is_seen(change: Callable[[nn.Module], None]) -> None:
    model = tw.convert_model(small("GraniteSWA"), "int8")
    before = decoded(model, GIVEN)[0]
    change(model)
    found = decoded(model, GIVEN)[0]
    agree(found, decoded(by_layers(model), GIVEN)[0])
    assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True)) == (change is chosen)


def test_gpt_oss_goes_layer_by_layer_and_says_why() -> None:
    model = tw.convert_model(small("GptOss"), "int8")
    found = decoded(model, GIVEN)[0]
    agree(found, decoded(by_layers(model), GIVEN)[0])
    states = list(states_of(model).values())
    assert len(states) == 2 and all("experts" in state and "branches on a value" in state for state in states)
    words = str(tw.report(model))
    assert "attention of 2 modules" in words and "layer by layer: mlp.experts" in " ".join(words.split())


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_wants_weights_or_gradients_gets_theirs(kind: str) -> None:
    model = tw.convert_model(small(kind), "int8")
    with torch.no_grad():
        plain = model(**GIVEN)
        y = model(**GIVEN, output_attentions=True)
    assert [weights.shape for weights in y.attentions] == [(2, 4, 7, 7)] * 2
    torch.testing.assert_close(y.logits, plain.logits, atol=0.1, rtol=0.1)  # int8 steps of what follows
    model(**GIVEN).logits.sum().backward()
    assert model.model.layers[0].self_attn.sinks.grad.abs().max() > 0


def test_copies_and_going_back() -> None:
    model = tw.convert_model(small("GptOss"), "int8")
    expected = decoded(model, GIVEN, 1)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert other.model.layers[0].self_attn.config._attn_implementation == attention.NAME
        agree(decoded(other, GIVEN, 1)[0], expected)
    back = tw.revert_model(model)
    assert all(type(vars(part).get("config")) is not attention.AttentionConfig for part in back.modules())


def test_another_eager_attention_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("GptOss")
    part = model.model.layers[0].self_attn
    theirs: Any = sinks.eager_attention(part)

    def twice(*args: Any, **kwargs: Any) -> Any:
        y, weights = theirs(*args, **kwargs)
        return y * 2, weights

    monkeypatch.setitem(theirs.__globals__, "eager_attention_forward", twice)
    assert sinks.eager_attention(part) is twice and attention.use(model) == []
    monkeypatch.setitem(theirs.__globals__, "eager_attention_forward", lambda module, query: query)
    assert attention.use(model) == []
    monkeypatch.undo()
    assert len(attention.use(model)) == 2
