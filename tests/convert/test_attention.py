"""The attention of converted transformers: ours where it computes the same, theirs everywhere else."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tilewright.convert import convert_model, load_model, report, revert_model, save_model, timing
from tilewright.convert.graph import attention
from tilewright.kernels.cpu import native

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
pytestmark = pytest.mark.skipif(native.why_no_native() is not None, reason=str(native.why_no_native()))

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {"vocab_size": 96, "max_position_embeddings": 32, "pad_token_id": 0}
INPUTS = {"input_ids": torch.arange(2, 26).reshape(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
INPUTS["attention_mask"][1, 7:] = 0


def bert(**options: object) -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL, **TEXT, **options)).eval()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, **TEXT, num_key_value_heads=2, bos_token_id=0, eos_token_id=1)
    return transformers.LlamaModel(config).eval()


def named(model: nn.Module) -> str:
    """What the attention modules of ``model`` compute, by name. Its config names nothing of ours."""
    assert model.config._attn_implementation != attention.NAME
    (name,) = {
        module.config._attn_implementation
        for module in model.modules()
        if "Attention" in type(module).__name__ and hasattr(module, "config")
    }
    return name


@torch.inference_mode()
def hidden(model: nn.Module) -> torch.Tensor:
    return model(**INPUTS).last_hidden_state


def calls(model: nn.Module) -> set[str]:
    """Operators that a forward pass dispatches to."""
    with torch.profiler.profile() as profile:
        hidden(model)
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("build", [bert, llama])
def test_a_converted_model_uses_it_and_computes_the_same(build):
    model = build()
    with_theirs, with_ours = convert_model(model, "int8", fuse=False), convert_model(model, "int8")
    assert named(model) == named(with_theirs) == "sdpa"
    assert named(with_ours) == attention.NAME
    assert "tilewright::attention" in calls(with_ours)
    assert "tilewright::attention" not in calls(with_theirs)
    assert torch.allclose(hidden(with_ours), hidden(with_theirs), atol=2e-2)  # int8 steps of what follows
    assert "attention of 2 modules" in str(report(with_ours))
    assert "attention of" not in str(report(with_theirs))


def test_the_function_equals_theirs_in_a_float_model():
    model = bert()
    expected = hidden(model)
    assert attention.use(model)
    assert torch.allclose(hidden(model), expected, atol=1e-5)
    attention.restore(model)
    assert named(model) == "sdpa"
    assert all(module.config is model.config for module in model.modules() if "config" in vars(module))
    assert torch.equal(hidden(model), expected)


def test_reverting_gives_theirs_back():
    assert named(revert_model(convert_model(bert(), "int8"))) == "sdpa"


@pytest.mark.parametrize("chosen", ["eager", "flex_attention"])
def test_another_choice_is_kept(chosen: str):
    model = bert(attn_implementation=chosen)
    assert named(convert_model(model, "int8")) == chosen


def test_a_model_that_asks_for_the_name_is_left_alone():
    config = transformers.FalconConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=96, bos_token_id=0, eos_token_id=1
    )
    model = nn.ModuleDict({"falcon": transformers.FalconModel(config).eval(), "bert": bert()})
    assert attention.use(model) == ["bert.encoder.layer.0.attention.self", "bert.encoder.layer.1.attention.self"]
    assert named(model["falcon"]) == "sdpa" and named(model["bert"]) == attention.NAME


def test_nothing_converted_leaves_it_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing.Times, "slower", True)
    model = convert_model(bert(), "int8", example_inputs=[INPUTS], keep_if_faster=True)
    assert not report(model).converted
    assert named(model) == "sdpa"


def test_training_and_gradients_go_to_theirs():
    model = convert_model(bert(), "int8")
    model(**INPUTS).last_hidden_state.sum().backward()
    assert model.encoder.layer[0].attention.self.query.bias.grad is not None


def test_copies_keep_it():
    model = convert_model(bert(), "int8")
    expected = hidden(model)
    assert torch.equal(hidden(copy.deepcopy(model)), expected)
    assert torch.equal(hidden(pickle.loads(pickle.dumps(model))), expected)  # noqa: S301


def test_a_pickled_model_runs_in_a_fresh_process(tmp_path: Path):
    model = convert_model(bert(), "int8")
    torch.save((model, INPUTS, hidden(model)), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, inputs, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.inference_mode(): y = model(**inputs).last_hidden_state\n"
        "assert torch.allclose(y, expected, atol=1e-5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_saved_model_has_it_again(tmp_path: Path):
    model = convert_model(bert(), "int8")
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, lambda: bert())
    assert named(loaded) == attention.NAME
    assert torch.equal(hidden(loaded), hidden(model))
    save_model(convert_model(bert(), "int8", fuse=False), tmp_path)
    assert named(load_model(tmp_path, lambda: bert())) == "sdpa"


def test_compiles_without_a_break():
    model = convert_model(bert(), "int8")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(hidden(compiled), hidden(model), atol=1e-5)


def test_exports_as_theirs():
    model = convert_model(bert(), "int8")
    program = torch.export.export(model, (), INPUTS)
    targets = {str(node.target) for node in program.graph.nodes}
    assert "tilewright.attention.default" not in targets
    assert any("scaled_dot_product_attention" in target for target in targets)


# ---- configs belong to the user
def test_no_config_is_written_to(tmp_path: Path):
    config = transformers.BertConfig(**SMALL, **TEXT)
    model, other = transformers.BertModel(config).eval(), transformers.BertModel(config).eval()
    expected, before = hidden(other), copy.deepcopy(vars(config))
    small = convert_model(model, "int8", inplace=True)
    save_model(small, tmp_path)
    loaded = load_model(tmp_path, lambda: transformers.BertModel(config).eval())
    assert named(small) == named(loaded) == attention.NAME
    assert small.config is loaded.config is other.config is config
    assert vars(config) == before
    assert named(other) == "sdpa" and torch.equal(hidden(other), expected)


@pytest.mark.parametrize(
    "config_of",
    [
        lambda q, folder: q.config,
        lambda q, folder: copy.deepcopy(q.config),
        lambda q, folder: copy.deepcopy(q).config,
        lambda q, folder: pickle.loads(pickle.dumps(q)).config,  # noqa: S301
        lambda q, folder: type(q.config).from_dict(q.config.to_dict()),
        lambda q, folder: type(q.config).from_dict(q.encoder.layer[0].attention.self.config.to_dict()),
        lambda q, folder: q.config.save_pretrained(folder) or type(q.config).from_pretrained(folder),
    ],
    ids=["same", "deepcopy", "of a deepcopy", "pickle", "dict", "part's dict", "file"],
)
def test_a_new_model_of_its_config_has_the_usual_attention(config_of, tmp_path: Path):
    small = convert_model(bert(), "int8")
    config = config_of(small, tmp_path)
    fresh = type(small)(config).eval()
    assert named(fresh) == "sdpa"
    fresh.load_state_dict(bert().state_dict())
    assert "tilewright::attention" not in calls(fresh)
    assert "tilewright" not in str(config.to_json_string()) and named(small) == attention.NAME


def test_the_config_of_an_attention_module_is_the_models():
    small = convert_model(bert(), "int8")
    seen = small.encoder.layer[0].attention.self.config
    assert isinstance(seen, transformers.BertConfig) and seen == small.config and repr(seen) == repr(small.config)
    assert seen is small.encoder.layer[1].attention.self.config
    small.config.output_hidden_states = True
    assert seen.output_hidden_states is True
    seen.note = "of the user"
    assert small.config.note == "of the user"
    del seen.note
    assert not hasattr(small.config, "note")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = seen.no_such_thing
    type(small)(seen)
    assert small.config._attn_implementation == "sdpa"
    twin = copy.deepcopy(small)
    twin.config.output_hidden_states = False
    assert twin.encoder.layer[0].attention.self.config.output_hidden_states is False
    assert seen.output_hidden_states is True


def test_a_later_choice_of_the_user_counts():
    small = convert_model(bert(), "int8")
    small.set_attn_implementation("eager")
    assert named(small) == "eager" and "tilewright::attention" not in calls(small)
    with torch.inference_mode():
        assert len(small(**INPUTS, output_attentions=True).attentions) == 2
    small.set_attn_implementation("sdpa")
    assert named(small) == attention.NAME and "tilewright::attention" in calls(small)
