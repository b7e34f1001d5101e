"""A cache of int8 codes: it says what it loses, steps of a program read its codes, and it may be changed as others."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch

import tilewright as tw
from tests.convert import test_decoders as decoders
from tilewright.kernels.cpu import steps
from tilewright.kernels.cpu.replay_cache import CachedAttention

transformers = pytest.importorskip("transformers", reason="needs transformers")
cache_utils = pytest.importorskip("transformers.cache_utils", reason="needs caches of layers")
if not hasattr(cache_utils, "DynamicSlidingWindowLayer"):
    pytest.skip("needs caches of layers", allow_module_level=True)

from tilewright.convert.graph import int8_cache  # noqa: E402  (needs transformers)

REASON = steps.why_no_kernels()
needs_kernels = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def tokens(count: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, count, 16), torch.randn(batch, 3, count, 16)


def filled(cache: Any, *counts: int) -> Any:
    for count in counts:
        cache.update(*tokens(count), 0)
    return cache


def sliding(window: int = 6) -> Any:
    cache = tw.Int8Cache()
    cache.layer_class_to_replicate = None
    cache.layers = [int8_cache.Int8SlidingLayer(window)]
    return cache


def test_holds_each_number_to_half_a_step() -> None:
    torch.manual_seed(0)
    cache, given = tw.Int8Cache(), []
    for count in (5, 1, 1, 200, 1):
        given.append(tokens(count))
        found = cache.update(*given[-1], 0)
        for which, y in enumerate(found):
            exact = torch.cat([each[which] for each in given], 2).double()
            step = exact.abs().amax(-1, keepdim=True) / 127
            assert ((y.double() - exact).abs() <= step * (0.5 + 1e-4)).all()
    keys, values = (torch.cat([each[which] for each in given], 2) for which in (0, 1))
    for exact, held, stated in zip((keys, values), found, cache.error, strict=True):
        noise = (exact.double() - held.double()).square().sum()
        assert stated == pytest.approx(10 * math.log10(exact.double().square().sum() / noise), abs=1e-3)
    assert min(cache.error) > 40 and f"{cache.error.keys:.1f} dB" in str(cache)
    assert cache.nbytes == 2 * 2 * 3 * 208 * (16 + 4) and cache.get_seq_length() == 208


def test_the_report_shows_the_error_and_the_bytes() -> None:
    torch.manual_seed(0)
    cache, model = filled(tw.Int8Cache(), 7), torch.nn.Linear(4, 4)
    told = tw.report(model, cache=cache)
    assert told.cache == str(cache) == told.to_json()["cache"] and str(cache) in " ".join(str(told).split())
    assert f"{cache.nbytes} bytes" in told.cache and f"of values {cache.error.values:.1f} dB" in told.cache
    assert tw.report(model).cache == ""
    with pytest.raises(TypeError, match="not DynamicCache"):
        tw.report(model, cache=transformers.DynamicCache())


def test_what_cannot_be_held() -> None:
    cache = tw.Int8Cache()
    key, value = tokens(3)
    key[0, 0, 1, 3], key[0, 1, 2, 3], value[1] = math.nan, math.inf, 0
    keys, values = cache.update(key, value, 0)
    assert keys[0, 0, 1].isnan().all() and keys[0, 1, 2].isnan().all() and keys.isnan().sum() == 32
    assert torch.equal(values[1], value[1])
    with pytest.raises(RuntimeError, match="no gradient"):
        cache.update(key.requires_grad_(), value, 0)
    mamba = transformers.BambaConfig(num_hidden_layers=2, attn_layer_indices=[1])
    with pytest.raises(ValueError, match="has no layer in place of"):
        tw.Int8Cache(mamba)


def test_is_changed_as_the_cache_of_transformers() -> None:
    torch.manual_seed(0)
    mine, theirs = tw.Int8Cache(), transformers.DynamicCache()

    def both(change: Any) -> None:
        change(mine), change(theirs)

    def take(batch: int) -> None:
        given = tokens(2, batch)
        y, wanted = mine.update(*given, 0), theirs.update(*given, 0)
        assert all(torch.allclose(a, b, atol=0.03) for a, b in zip(y, wanted, strict=True))
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert mine.get_mask_sizes(3, 0) == theirs.get_mask_sizes(3, 0)

    take(2), take(2)
    both(lambda cache: cache.crop(-3)), take(2)
    both(lambda cache: cache.reorder_cache(torch.tensor([1, 0]))), take(2)
    both(lambda cache: cache.batch_repeat_interleave(2)), take(4)
    both(lambda cache: cache.batch_select_indices(torch.tensor([3, 1]))), take(2)
    mine = copy.deepcopy(mine)
    take(2)
    mine = pickle.loads(pickle.dumps(mine))  # noqa: S301  (made just now)
    take(2)
    both(lambda cache: cache.reset()), take(1)
    with pytest.raises(ValueError, match="negative"):
        mine.crop(1)


def test_a_window_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    mine, theirs = sliding(), tw.Int8Cache()
    theirs.layers, theirs.layer_class_to_replicate = [cache_utils.DynamicSlidingWindowLayer(6)], None
    for count in (3, 1, 1, 1, 2, 1, 70, 1, 40, 1):
        given = tokens(count)
        assert mine.get_mask_sizes(count, 0) == theirs.get_mask_sizes(count, 0)
        for a, b in zip(mine.update(*given, 0), theirs.update(*given, 0), strict=True):
            assert a.shape == b.shape and torch.allclose(a, b, atol=0.03)
        assert mine.get_seq_length() == theirs.get_seq_length()
    with pytest.raises(RuntimeError, match="nothing from before it"):
        mine.crop(-1)


def test_copies_part_ways() -> None:
    mine = filled(tw.Int8Cache(), 5)
    other = copy.copy(mine)
    other.layers = [copy.copy(mine.layers[0])]
    key, value = tokens(1)
    first, _ = mine.update(key, value, 0)
    second, _ = other.update(-key, value, 0)
    assert torch.equal(first[:, :, -1], -second[:, :, -1]) and torch.equal(mine.layers[0].keys, first)


def test_modes_in_turns() -> None:
    cache = tw.Int8Cache()
    for number in range(5):
        with torch.inference_mode(number % 2 == 0):
            filled(cache, 1)
    assert cache.get_seq_length() == 5 and math.isfinite(cache.error.keys)


@needs_kernels
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma3", "gpt2"])
def test_steps_read_the_codes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if decoders.REASON:
        pytest.skip(decoders.REASON)
    taken = []
    take = CachedAttention.take

    def noted(self: CachedAttention, room: Any, count: int | None = None) -> bool:
        taken.append(len(room) > 3 and room[0].dtype == torch.int8)
        return take(self, room, count)

    monkeypatch.setattr(CachedAttention, "take", noted)
    model, given = decoders.converted(kind), decoders.prompt(padded=True)
    plain = decoders.by_layers(model)
    found, cache = decoders.decoded(model, given, cache=tw.Int8Cache(model.config))
    expected, other = decoders.decoded(plain, given, cache=tw.Int8Cache(model.config))
    decoders.agree(found, expected)
    assert decoders.are_programs(model) and sum(taken) >= 6
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
    assert cache.error == pytest.approx(other.error, abs=1e-4)
    exact, _ = decoders.decoded(plain, given)
    for y, wanted in zip(found, exact, strict=True):
        assert (y - wanted).norm() < 0.05 * wanted.norm()


@needs_kernels
def test_generates_with_beams() -> None:
    if decoders.REASON:
        pytest.skip(decoders.REASON)
    model, given = decoders.converted(), decoders.prompt()
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    found = model.generate(**given, past_key_values=tw.Int8Cache(model.config), **options)
    plain = decoders.by_layers(model)
    assert torch.equal(found, plain.generate(**given, past_key_values=tw.Int8Cache(model.config), **options))


def test_memory_without_meaning_is_no_result_of_a_call() -> None:
    """A program compares the tensors that a cache holds with those of the layers; room holds anything."""
    cache = filled(tw.Int8Cache(), 3)
    assert [tensor for tensor in vars(cache.layers[0]).values() if isinstance(tensor, torch.Tensor)] == []
