"""Decoders with a cache as programs: they are used, equal the layers to the bit, and leave the cache the user's."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright.convert.network.blocks import Block, remove_blocks, states_of
from tilewright.convert.network.program import Program
from tilewright.kernels.cpu import norms, steps
from tilewright.kernels.cpu.replay_cache import CachedAttention

transformers = pytest.importorskip("transformers", reason="needs transformers")
if not hasattr(transformers.DynamicCache, "crop"):
    pytest.skip("needs caches of layers", allow_module_level=True)
REASON = steps.why_no_kernels() or (
    None
    if norms.lanes() and norms.square_lanes()
    else "this PyTorch adds in an order that the C kernels' norms do not know"
)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SIZE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 99,
    "max_position_embeddings": 600,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GEMMA = {**SIZE, "head_dim": 16}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZE),
    "qwen2": ("Qwen2", SIZE),
    "qwen3": ("Qwen3", {**SIZE, "head_dim": 16}),
    "mistral": ("Mistral", {**SIZE, "sliding_window": 6}),
    "gemma": ("Gemma", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", {**GEMMA, "sliding_window": 6, "query_pre_attn_scalar": 16}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 600}),
}
RECIPES = ["int8", "w4a8", "int4", "w8a16"]


def small(kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    name, options = DECODERS[kind]
    model_class = getattr(transformers, name if name.endswith(("LM", "Model")) else f"{name}ForCausalLM")
    config = model_class.config_class(**{**options, "eos_token_id": None})
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.normal_(0.5)
    model.generation_config.pad_token_id = 0
    return model


def converted(kind: str = "llama", recipe: Any = "int8") -> nn.Module:
    return tw.convert_model(small(kind), recipe)


def by_layers(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    remove_blocks(plain)
    return plain


def prompt(batch: int = 2, length: int = 7, padded: bool = False) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    if padded:
        mask[1:, : length // 2] = 0
    return {"input_ids": torch.randint(3, 99, (batch, length)), "attention_mask": mask}


def decoded(
    model: nn.Module, given: dict[str, torch.Tensor], steps_of_one: int = 6, cache: Any = None
) -> tuple[list[torch.Tensor], Any]:
    """The logits of the prompt and of tokens one by one, which are always the same; and the cache."""
    torch.manual_seed(7)
    tokens = torch.randint(3, 99, (steps_of_one, len(given["input_ids"]), 1))
    mask, found = given["attention_mask"], []
    with torch.no_grad():
        y = model(**given, past_key_values=cache, use_cache=True)
        found.append(y.logits)
        for token in tokens:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            y = model(input_ids=token, attention_mask=mask, past_key_values=y.past_key_values, use_cache=True)
            found.append(y.logits)
    return found, y.past_key_values


def agree(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """To the bit."""
    for number, (y, wanted) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(y, wanted), f"step {number}: {(y - wanted).abs().max()}"


def blocks_of(model: nn.Module) -> list[Block]:
    return [vars(part)["forward"] for part in model.modules() if isinstance(vars(part).get("forward"), Block)]


def are_programs(model: nn.Module, calls: str = "1 C call") -> bool:
    """Whether every block ran as a program, in two C calls around a cache that updates itself."""
    states = list(states_of(model).values())
    return len(states) == 2 and all(
        state.startswith("one program: ") and state.endswith(f"in {calls}") for state in states
    )


def recordings_of(model: nn.Module) -> int:
    programs = [each for block in blocks_of(model) for each in block.programs.values() if isinstance(each, Program)]
    return sum(len(each._replays.replays) for each in programs if each._replays is not None)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", DECODERS)
def test_steps_of_a_decoder_are_programs(kind: str, recipe: str, padded: bool) -> None:
    model, given = converted(kind, recipe), prompt(padded=padded)
    found, cache = decoded(model, given)
    expected, other = decoded(by_layers(model), given)
    agree(found, expected)
    assert cache.get_seq_length() == other.get_seq_length() == 13
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
    assert are_programs(model), states_of(model)
    agree(decoded(model, given)[0], expected)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_growing_lengths_are_served_by_one_recording(kind: str) -> None:
    model, given = converted(kind), prompt(1, 5)
    decoded(model, given, 3)
    before = recordings_of(model)
    found, _ = decoded(model, given, 20)
    agree(found, decoded(by_layers(model), given, 20)[0])
    # Those of one token, and of the prompt, which was called twice.
    assert (before, recordings_of(model)) == (2, 4)
    given = prompt(2, 5, padded=True)
    decoded(model, given, 3)
    before = recordings_of(model)
    decoded(model, given, 20)
    assert recordings_of(model) == before + 2
    assert are_programs(model), states_of(model)


def test_more_keys_than_the_c_kernel_takes() -> None:
    model, given = converted(), prompt(1, 508)
    agree(decoded(model, given, 9)[0], decoded(by_layers(model), given, 9)[0])
    assert are_programs(model), states_of(model)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}, {"do_sample": True}],
    ids=["greedy", "beams", "static", "no cache", "sampled"],
)
def test_generate(kind: str, options: dict[str, Any]) -> None:
    model = converted(kind)
    plain = by_layers(model)
    for padded in (False, True):
        given = prompt(2, 6, padded)
        answers = []
        for each in (model, plain):
            torch.manual_seed(3)
            answers.append(each.generate(**given, max_new_tokens=9, disable_compile=True, **options))
        assert torch.equal(*answers)
    if options.get("use_cache") is not False:
        window = "sliding_window" in DECODERS[kind][1] and "cache_implementation" in options
        assert are_programs(model, "2 C calls" if window else "1 C call"), states_of(model)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_with_a_cache_and_without(kind: str) -> None:
    model, given = converted(kind), prompt(1, 6)
    answers = [model.generate(**given, max_new_tokens=8, use_cache=use) for use in (True, False)]
    assert torch.equal(*answers)


def test_a_cache_that_is_cropped_and_reordered() -> None:
    model, given = converted(), prompt(3, 9)
    plain, answers = by_layers(model), []
    for each in (model, plain):
        _, cache = decoded(each, given, 4)
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        token = torch.full((3, 1), 5)
        with torch.no_grad():
            for _ in range(3):
                y = each(input_ids=token, past_key_values=cache).logits
        assert cache.get_seq_length() == 13
        answers.append([y])
    agree(*answers)


def test_a_prompt_in_parts() -> None:
    model, ids = converted(), torch.randint(3, 99, (1, 24))
    plain, answers = by_layers(model), []
    for each in (model, plain):
        for _ in range(3):
            cache, found = transformers.DynamicCache(), []
            with torch.no_grad():
                for part in ids.split(8, 1):
                    found.append(each(input_ids=part, past_key_values=cache).logits)
        answers.append(found)
    agree(*answers)


def hook(model: nn.Module) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, result: result * 2)


def hook_on_a_layer(model: nn.Module) -> None:
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, result: result * 2)


def written_norm(model: nn.Module) -> None:
    model.model.layers[0].input_layernorm.weight.data = torch.randn(48)


def other_epsilon(model: nn.Module) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def other_weight(model: nn.Module) -> None:
    model.model.layers[0].mlp.down_proj.weight = nn.Parameter(torch.randn(48, 96))


def another_layer(model: nn.Module) -> None:
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[1].mlp)


CHANGES: list[Callable[[nn.Module], None]] = [
    *(hook, hook_on_a_layer, written_norm, other_epsilon, other_weight, another_layer)
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_was_changed_is_seen(change: Callable[[nn.Module], None]) -> None:
    model, given = converted(), prompt()
    before, cache = decoded(model, given)
    with torch.no_grad():
        change(model)
    expected, _ = decoded(by_layers(model), given)
    for _ in range(3):
        agree(decoded(model, given)[0], expected)
    assert not torch.allclose(before[-1], expected[-1], rtol=0.01)
    # A cache of before goes on.
    with torch.no_grad():
        assert model(torch.full((2, 1), 5), past_key_values=cache).logits.shape == (2, 1, 99)


def test_whoever_looks_inside() -> None:
    model, given = converted(), prompt()
    decoded(model, given)
    plain = by_layers(model)
    with torch.no_grad():
        found, expected = (each(**given, output_hidden_states=True).hidden_states for each in (model, plain))
    agree(list(found), list(expected))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert model(**given, output_attentions=True).attentions[0].shape == (2, 4, 7, 7)


def test_training_and_gradients_go_through_the_layers() -> None:
    model, given = converted(), prompt()
    decoded(model, given)
    model(**given).logits.sum().backward()
    assert model.model.layers[0].input_layernorm.weight.grad is not None
    _, cache = decoded(model, given, 1)
    model(torch.full((2, 1), 5), past_key_values=cache).logits.sum().backward()


def test_modes_in_turns() -> None:
    model, given = converted(), prompt(1)
    expected = by_layers(model).generate(**given, max_new_tokens=5)
    for _ in range(3):
        with torch.inference_mode():
            assert torch.equal(model.generate(**given, max_new_tokens=5), expected)
            static = model.generate(**given, max_new_tokens=5, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, expected)
        assert torch.equal(model.generate(**given, max_new_tokens=5), expected)


def test_a_replay_keeps_nothing_of_a_call() -> None:
    import gc
    import weakref

    model, given = converted(), prompt(1)
    _, cache = decoded(model, given)
    seen = [weakref.ref(layer.keys) for layer in cache.layers]
    assert are_programs(model)
    del cache
    gc.collect()
    assert not any(each() is not None for each in seen)


def test_what_a_cache_keeps_is_its_own() -> None:
    class Keeping(transformers.DynamicCache):
        """Holds on to the tensors that it is given."""

        def __init__(self) -> None:
            super().__init__()
            self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

        def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
            if layer == 0:
                self.kept.append((key, key.clone()))
            return super().update(key, value, layer, *args, **kwargs)

    model, given = converted(), prompt(1)
    _, cache = decoded(model, given, 8, Keeping())
    assert are_programs(model, "2 C calls"), states_of(model)
    assert len(cache.kept) == 9
    for key, copied in cache.kept:
        assert torch.equal(key, copied)


def test_a_cache_that_raises_is_heard() -> None:
    class Full(transformers.DynamicCache):
        def update(self, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.get_seq_length() > 9:
                raise ValueError("the cache is full")
            return super().update(key, *args, **kwargs)

    model, given = converted(), prompt(1)
    for _ in range(2):
        with pytest.raises(ValueError, match="the cache is full"):
            decoded(model, given, 8, Full())
    agree(decoded(model, given, 8)[0], decoded(by_layers(model), given, 8)[0])


def test_threads_that_call_at_once() -> None:
    model, given = converted(), [prompt(1) for _ in range(4)]
    plain = by_layers(model)
    expected = [decoded(plain, each, 8)[0] for each in given]
    found: dict[int, list[torch.Tensor]] = {}

    def tokens(i: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                cache = transformers.DynamicCache()
                found[i] = [model(**given[i], past_key_values=cache).logits]
                mask = given[i]["attention_mask"]
                for token in steps_of[i]:
                    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                    found[i].append(model(token, attention_mask=mask, past_key_values=cache).logits)

    torch.manual_seed(7)  # as ``decoded`` draws them
    same = torch.randint(3, 99, (8, 1, 1))
    steps_of = [same] * 4
    threads = [threading.Thread(target=tokens, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        agree(found[i], expected[i])


def test_copies() -> None:
    model, given = converted(), prompt()
    expected, _ = decoded(model, given)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  (made just now)
        agree(decoded(each, given)[0], expected)
        assert are_programs(each), states_of(each)
    assert not any("forward" in vars(part) for part in tw.revert_model(model).modules())


def test_a_step_that_does_not_fit_what_a_cache_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = converted(), prompt()
    decoded(model, given)
    assert are_programs(model), states_of(model)
    monkeypatch.setattr(CachedAttention, "take", lambda self, room: False)
    found, cache = decoded(model, given)
    assert are_programs(model, "2 C calls"), states_of(model)
    expected, other = decoded(by_layers(model), given)
    agree(found, expected)
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


def test_several_parts_of_keys_and_a_cache_that_others_look_at() -> None:
    model, given = converted(), prompt(2, 300, padded=True)
    plain, answers = by_layers(model), []
    for each in (model, plain):
        seen = []
        with torch.no_grad():
            y = each(**given, use_cache=True)
            for number in range(6):
                layer = y.past_key_values.layers[number % 2]
                seen.append((layer.keys, layer.keys.clone()))
                y = each(torch.full((2, 1), 5), past_key_values=y.past_key_values)
                layer.values[:, :, number] = 0.0
        assert all(torch.equal(*pair) for pair in seen)
        answers.append([y.logits])
    agree(*answers)
    assert are_programs(model), states_of(model)
