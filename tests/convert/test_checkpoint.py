from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tilewright.convert import CheckpointError, Int8ActInt4Weight, convert_model, load_model, report, save_model
from tilewright.convert.checkpoint.safetensors_file import open_regular, read_header
from tilewright.nn import QuantizedLinear


class Model(nn.Module):
    """A bit of everything that a state dict forgets or merges."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, width)
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width, bias=False)])
        self.again = self.layers[0]
        self.norm = nn.BatchNorm1d(width)
        self.decoder = nn.Linear(width, 40, bias=False)
        self.decoder.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(6).expand(1, -1), persistent=False)
        self.temperature = torch.tensor(1.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.positions[..., : ids.shape[-1], None]
        for layer in [*self.layers, self.again]:
            x = torch.relu(layer(x))
        return self.decoder(self.norm(x.mean(1))) * self.temperature


IDS = torch.arange(12).reshape(2, 6)


def trained(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = Model()
    model.positions = torch.arange(6).flip(0)[None]  # not what the factory makes
    model.temperature = torch.tensor(0.5)
    model.layers[0].bias.requires_grad_(False)
    model(IDS)
    return model.eval()


def saved(tmp_path: Path, recipe: Any = "int8", **options: Any) -> tuple[nn.Module, Path]:
    model = convert_model(trained(), recipe)
    save_model(model, tmp_path / "model", **options)
    return model, tmp_path / "model"


RECIPES = ["int8", "int8-weight-only", "int4", "int4-g32", "int4-symmetric", Int8ActInt4Weight(group_size=None)]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_is_bit_exact(recipe: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = convert_model(trained().to(dtype), recipe)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, Model)
    assert [(n, type(m), m.training) for n, m in loaded.named_modules()] == [
        (n, type(m), m.training) for n, m in model.named_modules()
    ]
    for name, tensor in model.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert torch.equal(loaded(IDS), model(IDS))
    assert torch.equal(loaded.positions, model.positions) and torch.equal(loaded.temperature, model.temperature)
    assert loaded.decoder.weight is loaded.embed.weight
    assert loaded.again is loaded.layers[0]
    assert report(loaded).to_json() == report(model).to_json()


def calibrated() -> nn.Module:
    """With outliers in the channels of the embedding, so that a scale for each input channel is worth having."""
    model = trained()
    with torch.no_grad():
        model.embed.weight[:, :2] *= 60
    return convert_model(model, "int8", calibration_data=[IDS])


def test_calibrated_layers_and_training_modes_come_back(tmp_path: Path) -> None:
    model = calibrated().train()
    model.norm.eval()
    model.layers[1].eval()
    assert model.layers[0].channel_scale is not None
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, Model)
    assert torch.equal(loaded.layers[0].channel_scale, model.layers[0].channel_scale)
    assert {n: m.training for n, m in loaded.named_modules()} == {n: m.training for n, m in model.named_modules()}


def test_the_float_weights_are_never_made(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    made: list[nn.Module] = []

    def factory() -> nn.Module:
        made.append(Model())
        assert all(parameter.is_meta for parameter in made[-1].parameters())
        return made[-1]

    loaded = load_model(folder, factory)
    assert loaded is made[0]
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(32, 32), lambda: nn.Sequential(nn.Linear(32, 32))], ids=["root", "child"]
)
def test_a_root_that_is_a_layer(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, x = convert_model(make(), "int8"), torch.randn(2, 32)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, make)
    assert type(loaded) is type(model) and torch.equal(loaded(x), model(x))


def test_an_unconverted_model_is_saved_too(tmp_path: Path) -> None:
    model = trained()
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path, Model)(IDS), model(IDS))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_native_encoder_path_is_closed_after_loading(tmp_path: Path) -> None:
    def factory() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()

    model = convert_model(factory(), "int8")
    save_model(model, tmp_path)
    x, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        outputs = [m(x, src_key_padding_mask=padding) for m in (model, load_model(tmp_path, factory))]
    assert torch.equal(*outputs)


def test_shards(tmp_path: Path) -> None:
    model, folder = saved(tmp_path, max_shard_bytes=2000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        with open_regular(file) as opened:
            entries, _ = read_header(opened, file)
        assert len(entries) == 1 or sum(e.end - e.begin for e in entries.values()) <= 2000
    assert torch.equal(load_model(folder, Model)(IDS), model(IDS))
    with pytest.raises(ValueError, match="max_shard_bytes must be positive"):
        save_model(model, folder, max_shard_bytes=0)


def test_the_files_open_elsewhere(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model, folder = saved(tmp_path)
    (file,) = folder.glob("*.safetensors")
    tensors = safetensors.load_file(file)
    assert torch.equal(tensors["layers.0.weight_codes"], model.layers[0].weight_codes)
    assert "decoder.weight" not in tensors  # stored once, as embed.weight
    # and the other way: the state dict is one of plain tensors that the package takes
    safetensors.save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "state.safetensors")
    fresh = convert_model(trained(1), "int8")
    fresh.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
    fresh.positions, fresh.temperature = model.positions, model.temperature
    assert torch.equal(fresh(IDS), model(IDS))


def test_a_save_replaces_an_older_one(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, "int8", max_shard_bytes=2000)
    (folder / "notes.txt").write_text("mine")
    newer, _ = saved(tmp_path, "int4")
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".safetensors", ".txt"]
    assert torch.equal(load_model(folder, Model)(IDS), newer(IDS))


def test_a_save_that_fails_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older, folder = saved(tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model(convert_model(trained(1), "int4"), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    monkeypatch.undo()
    assert torch.equal(load_model(folder, Model)(IDS), older(IDS))


class ExtraState(nn.Linear):
    def get_extra_state(self) -> object:
        return {"x": 1}


def overlapping() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    flat = torch.zeros(6, 4)
    model[0].weight, model[1].weight = nn.Parameter(flat[:4]), nn.Parameter(flat[2:])
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Linear(4, 4, device="meta"), "'weight' is on the meta device"),
        (lambda: nn.Linear(4, 4).to(torch.complex64), "'weight' .Tensor, torch.complex64. has no place"),
        (lambda: nn.Sequential(ExtraState(4, 4)), "'0' .ExtraState. has extra state"),
        (overlapping, "'0.weight' and '1.weight' overlap in memory"),
    ],
)
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_what_cannot_be_saved_faithfully(make: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_model(make(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


# ------------------------------------------------------------------------------------------------------ broken folders
def shard_of(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def test_a_checkpoint_of_another_model_names_what_does_not_fit(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)

    class Other(Model):
        def __init__(self) -> None:
            super().__init__()
            self.further = nn.Linear(8, 8)
            del self.norm

    with pytest.raises(
        CheckpointError,
        match="lacks 2: 'further.weight', 'further.bias'; it has 5 unexpected: 'norm.",
    ):
        load_model(folder, Other)
    with pytest.raises(CheckpointError, match="layer 'layers.0': maps 32 features to 32, the factory's 16 to 16"):
        load_model(folder, lambda: Model(16))
    with pytest.raises(CheckpointError, match="layer 'layers.0': Sequential has no such layer"):
        load_model(folder, lambda: nn.Sequential(nn.Linear(32, 32)))
    with pytest.raises(CheckpointError, match="layer 'layers.0': was a Linear, but the factory's is a ReLU"):
        load_model(folder, lambda: nn.ModuleDict({"layers": nn.Sequential(nn.ReLU())}))

    class Wider(Model):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(33)

    with pytest.raises(CheckpointError, match="'norm.weight' is torch.float32 .32., Wider needs torch.float32 .33."):
        load_model(folder, Wider)


@pytest.mark.parametrize("keep", [0, 5, 100, 1000, -1])
def test_a_truncated_data_file(keep: int, tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    content = shard_of(folder).read_bytes()
    shard_of(folder).write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match="safetensors: truncated"):
        load_model(folder, Model)


@pytest.mark.parametrize("keep", [0, 1, 500, -2])
def test_a_truncated_manifest(keep: int, tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    manifest = folder / "tilewright.json"
    manifest.write_bytes(manifest.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="tilewright.json: not valid JSON"):
        load_model(folder, Model)


def test_missing_files(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    shard_of(folder).unlink()
    with pytest.raises(CheckpointError, match="safetensors: cannot be opened: No such file"):
        load_model(folder, Model)
    with pytest.raises(CheckpointError, match="tilewright.json: cannot be opened"):
        load_model(tmp_path / "nowhere", Model)


def test_one_flipped_bit_anywhere_in_the_data(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    shard = shard_of(folder)
    content = bytearray(shard.read_bytes())
    data_start = 8 + int.from_bytes(content[:8], "little")
    for position in range(data_start, len(content), 997):
        broken = bytearray(content)
        broken[position] ^= 4
        shard.write_bytes(broken)
        with pytest.raises(CheckpointError, match="tensor '.*': its bytes do not match the checksum"):
            load_model(folder, Model)


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "tilewright.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def shard_named(name: str) -> Callable[[dict], object]:
    return lambda data: data["tensors"]["embed.weight"].update(shard=name)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(format="zip"), "not a Tilewright manifest"),
        (lambda d: d.update(version=99), "version 99 of the format, this Tilewright reads version 1"),
        (lambda d: d.pop("tensors"), "damaged: KeyError: 'tensors'"),
        (lambda d: d.update(tensors=[]), "'tensors' is not an object"),
        (lambda d: d.update(training=1), "'training' is not true or false"),
        (lambda d: d.update(differing=[1]), "'differing' is not a list of names"),
        (lambda d: d["tied"].update({"x": "nothing"}), "'x' is tied to 'nothing', which is not stored"),
        (lambda d: d["tied"].update({"x": []}), "'tied' does not map names to names"),
        (lambda d: d["tied"].update({"norm.bias": "norm.weight"}), "'norm.bias' is both stored and tied"),
        (lambda d: d["record"]["layers"]["layers.0"].update(bytes_before="x"), "byte counts of 'layers.0'"),
        (lambda d: d["record"]["layers"]["layers.0"].update(more=1), "damaged: TypeError"),
        (shard_named("../../etc/passwd"), "'../../etc/passwd' is no file name"),
        (shard_named("/etc/x.safetensors"), "is no file name"),
        (shard_named(".."), "is no file name"),
        (shard_named("a\\b.safetensors"), "is no file name"),
        (lambda d: [t.update(shard="x.safetensors") for t in d["tensors"].values()], "x.safetensors: cannot be opened"),
        (lambda d: d["tensors"]["embed.weight"].update(sha256="0" * 64), "'embed.weight': its bytes do not match"),
        (lambda d: d["tensors"]["embed.weight"].update(sha256="?"), "no SHA-256"),
        (lambda d: d["tensors"]["embed.weight"].update(sha256=3), "damaged: TypeError"),
        (lambda d: d["tensors"]["embed.weight"].update(dtype="F7"), "unknown dtype 'F7'"),
        (lambda d: d["tensors"]["embed.weight"].update(dtype=["F32"]), "damaged: TypeError"),
        (lambda d: d["tensors"]["embed.weight"].update(kind="file"), "unknown kind 'file'"),
        (lambda d: d["tensors"]["embed.weight"].update(shape=["40"]), "no shape"),
        (lambda d: d["tensors"]["layers.0.weight_codes"].update(requires_grad=True), "torch.int8 takes no gradient"),
        (lambda d: d["tensors"]["embed.weight"].update(shape=[32, 40]), r"is torch.float32 \[40, 32\] in the file"),
        (lambda d: d["tensors"]["embed.weight"].update(dtype="F16"), "torch.float16 .40, 32. in the manifest"),
        (
            lambda d: d["tensors"].pop("norm.bias"),
            "holds the tensors 'norm.bias', which the manifest does not place there",
        ),
        (lambda d: d["tensors"].update({"x": d["tensors"]["norm.bias"]}), "lacks the tensors 'x'"),
        (
            lambda d: d["layers"]["layers.0"].update(module="Linear"),
            "module 'Linear' is unknown; known: .*ConvBnAct2d, Int4Linear",
        ),
        (lambda d: d["layers"]["layers.0"].update(module=[]), "its module is not a name"),
        (lambda d: d["layers"]["layers.0"].update(more=1), "needs module and config"),
        (lambda d: d["layers"]["layers.0"]["config"].update(more=1), "cannot be built from its config"),
        (lambda d: d["layers"]["layers.0"]["config"].update(device="cpu"), "cannot be built from its config"),
        (lambda d: d["layers"]["layers.0"]["config"].update(in_features=-3), "layer 'layers.0': "),
        (lambda d: d["layers"]["layers.0"]["config"].update(in_features=10**17), "layer 'layers.0': "),
        (lambda d: d["layers"]["layers.0"]["config"].update(in_features="32"), "layer 'layers.0': "),
        (lambda d: d["layers"]["layers.0"]["config"].update(dtype="load"), "cannot be built from its config"),
        (lambda d: d["layers"]["layers.0"]["config"].update(activation="exec"), "cannot be built from its config"),
        (
            lambda d: d["layers"]["layers.0"]["config"].update(origin="Conv1D"),
            "was a Conv1D, but the factory's is a Linear",
        ),
        (lambda d: d["layers"]["layers.0"]["config"].update(channel_scale=True), "lacks 1: 'layers.0.channel_scale'"),
        (lambda d: d["layers"].pop("layers.1"), "does not fit Model: .*unexpected: 'layers.1.weight_codes'"),
        (lambda d: d["layers"].update(embed=d["layers"]["layers.0"]), "was a Linear, but the factory's is a Embedding"),
    ],
)
def test_hostile_manifests(change: Callable[[dict], object], message: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, Model)


def test_duplicate_names_in_the_manifest(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    path = folder / "tilewright.json"
    path.write_text(path.read_text().replace('"norm.bias": {', '"norm.weight": {', 1))
    with pytest.raises(CheckpointError, match="the name 'norm.weight' occurs twice"):
        load_model(folder, Model)


def test_a_manifest_too_large(tmp_path: Path) -> None:
    with (tmp_path / "tilewright.json").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(CheckpointError, match="more than the 67108864 allowed"):
        load_model(tmp_path, Model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight_scale", "channel_scale"])
def test_scales_that_are_not_finite(value: float, name: str, tmp_path: Path) -> None:
    model = calibrated()
    getattr(model.layers[0], name)[1] = value
    save_model(model, tmp_path)
    with pytest.raises(CheckpointError, match=f"tensor 'layers.0.{name}' holds a scale that is NaN or Inf"):
        load_model(tmp_path, Model)


def test_tensors_hidden_in_containers_are_refused(tmp_path: Path) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.tables = [torch.ones(3)]

    save_model(convert_model(Hidden(), "int8"), tmp_path)
    with pytest.raises(
        CheckpointError, match="Hidden keeps tensors in containers that no checkpoint can fill: 'tables'"
    ):
        load_model(tmp_path, Hidden)


def test_a_loaded_model_is_an_ordinary_module(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    loaded = copy.deepcopy(load_model(folder, Model))
    assert torch.equal(loaded(IDS), model(IDS))
    assert isinstance(loaded.layers[0], QuantizedLinear)
    loaded.load_state_dict(model.state_dict(), assign=True)
    assert loaded.layers[0].weight_codes.data_ptr() == model.layers[0].weight_codes.data_ptr()
