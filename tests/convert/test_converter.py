from __future__ import annotations

import copy
import ctypes
import io
import logging
import pickle
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from tilewright.convert import Int8Dynamic, convert_model, report, revert_model
from tilewright.convert.progress import Rest, track
from tilewright.nn import Int4Linear, Int8Linear, QuantizedLinear

ROOT = Path(__file__).resolve().parents[2]


def two_layers(dtype: torch.dtype | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 48, dtype=dtype), nn.GELU(), nn.BatchNorm1d(48, dtype=dtype), nn.Linear(48, 32, dtype=dtype)
    )


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 (bytes of our own)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


@pytest.mark.parametrize(
    "recipe, least", [("int8", 0.9998), ("int8-weight-only", 0.9998), ("int4-g32", 0.99), ("int8-int4", 0.98)]
)
def test_the_output_stays_close(recipe: str, least: float) -> None:
    model, x = two_layers().eval(), torch.randn(16, 64)
    converted = convert_model(model, recipe)
    assert isinstance(converted[0], QuantizedLinear)
    assert cosine(converted(x), model(x)) > least


def test_the_original_is_left_as_it_was_and_shared() -> None:
    model = two_layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    converted = convert_model(model, {"0": "int8"})
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any("tilewright" in name for name in vars(model))
    assert converted is not model and converted[3] is not model[3]
    assert converted[3].weight is model[3].weight
    assert converted[2].running_mean is model[2].running_mean
    assert converted[0].bias is model[0].bias


def test_inplace_changes_the_model_itself() -> None:
    model = two_layers()
    assert convert_model(model, "int8", inplace=True) is model
    assert isinstance(model[0], Int8Linear)
    assert revert_model(model, inplace=True) is model
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("inplace", [False, True])
def test_a_root_that_is_itself_a_layer(inplace: bool) -> None:
    linear = nn.Linear(64, 32)
    converted = convert_model(linear, "int8", inplace=inplace)
    assert type(converted) is Int8Linear
    assert [layer.name for layer in report(converted).converted] == [""]
    assert "(root)" in str(report(converted))
    assert type(revert_model(converted, inplace=inplace)) is nn.Linear


def test_a_shared_module_stays_shared() -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(32, 32))})
    for converted in (convert_model(model, "int8"), copy.deepcopy(convert_model(model, "int8"))):
        assert converted["a"] is converted["b"][0] and type(converted["a"]) is Int8Linear
        reverted = revert_model(converted)
        assert reverted["a"] is reverted["b"][0] and type(reverted["a"]) is nn.Linear


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.fc = nn.Linear(32, 32)
        self.decoder = nn.Linear(32, 50, bias=False)
        self.decoder.weight = self.embed.weight


def test_tied_weights_stay_tied() -> None:
    model = Tied()
    converted = convert_model(model, "int8")
    assert converted.decoder.weight is converted.embed.weight is model.embed.weight
    copied = copy.deepcopy(converted)
    assert copied.decoder.weight is copied.embed.weight is not model.embed.weight


class Custom(nn.Module):
    """Copies itself in its own way, and holds a tensor in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.table = [torch.ones(3)]

    def __deepcopy__(self, memo: dict) -> Custom:
        made = Custom()
        made.fc = copy.deepcopy(self.fc, memo)
        made.table = copy.deepcopy(self.table, memo)
        return made


def test_a_custom_deepcopy_is_respected() -> None:
    model = nn.Sequential(Custom(), nn.utils.parametrizations.orthogonal(nn.Linear(16, 16)))
    converted = convert_model(model, "int8")
    assert type(converted[0].fc) is Int8Linear and type(model[0].fc) is nn.Linear
    assert converted[0].table[0] is model[0].table[0]
    assert converted[1].parametrizations.weight.original is model[1].parametrizations.weight.original
    x = torch.randn(2, 16)
    assert torch.equal(converted[1](x), model[1](x))


def test_a_model_that_cannot_be_copied_can_be_converted_in_place() -> None:
    model = two_layers()
    model.stream = (i for i in range(3))
    with pytest.raises(TypeError, match="Sequential cannot be copied .*inplace=True needs no copy"):
        convert_model(model, "int8")
    assert isinstance(convert_model(model, "int8", inplace=True)[0], Int8Linear)


def test_hooks_and_attributes_move_along_and_back() -> None:
    model = two_layers()
    calls: list[str] = []
    before = model[0].register_forward_pre_hook(lambda module, args: calls.append("pre"))
    after = model[0].register_forward_hook(lambda module, args, kwargs, output: calls.append("post"), with_kwargs=True)
    model[0].note = "mine"
    model[0].eval()
    model[3].bias.requires_grad_(False)
    converted = convert_model(model, "int8", inplace=True)
    x = torch.randn(4, 64)
    converted(x)
    assert calls == ["pre", "post"]
    assert converted[0].note == "mine"
    assert not converted[0].training and converted[3].training
    assert not converted[3].bias.requires_grad and converted[0].bias.requires_grad
    after.remove()  # a handle from before the conversion still works
    reverted = revert_model(converted, inplace=True)
    reverted(x)
    assert calls == ["pre", "post", "pre"]
    before.remove()
    reverted(x)
    assert calls == ["pre", "post", "pre"]
    assert reverted[0].note == "mine" and not reverted[0].training
    assert vars(reverted[0]).keys() == vars(nn.Linear(1, 1)).keys() | {"note"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", ["int8", "int4-g32"])
def test_revert_gives_plain_layers_of_the_dtype(dtype: torch.dtype, recipe: str) -> None:
    model = two_layers(dtype)
    converted = convert_model(model, recipe)
    reverted = revert_model(converted)
    assert [type(module) for module in reverted.modules()] == [type(module) for module in model.modules()]
    assert {name: t.dtype for name, t in reverted.state_dict().items()} == {
        name: t.dtype for name, t in model.state_dict().items()
    }
    assert torch.equal(reverted[0].weight, converted[0].dequantize_weight().to(dtype))
    assert isinstance(converted[0], QuantizedLinear)  # not in place
    reverted.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="Sequential holds no converted layer"):
        revert_model(reverted)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_the_record_follows_the_model(way: str) -> None:
    converted = convert_model(two_layers(), {"0": "int8"}).eval()
    if way == "deepcopy":
        other = copy.deepcopy(converted)
    elif way == "pickle":
        other = pickled(converted)
    else:
        buffer = io.BytesIO()
        torch.save(converted, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    x = torch.randn(4, 64)
    assert torch.equal(other(x), converted(x))
    assert report(other).to_json() == report(converted).to_json()
    assert set(converted.state_dict()) == {"0.weight_codes", "0.weight_scale", "0.bias"} | {
        name for name in two_layers().state_dict() if not name.startswith("0.")
    }


def encoder(norm_first: bool = False, activation: str = "relu") -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first, activation=activation)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first).eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("recipe", ["int8", "int4-g32"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_native_encoder_path_is_not_taken_and_comes_back(recipe: str, norm_first: bool, activation: str) -> None:
    model = encoder(norm_first, activation)
    x, lengths = torch.randn(3, 7, 32), torch.tensor([7, 4, 2])
    padding = torch.arange(7) >= lengths.unsqueeze(-1)
    switches = [(layer.activation_relu_or_gelu) for layer in model.layers]
    nested = model.use_nested_tensor
    converted = convert_model(model, recipe)
    calls: list[nn.Module] = []
    with torch.no_grad():
        expected, plain = model(x, src_key_padding_mask=padding), model(x)
        for candidate in (converted, copy.deepcopy(converted), pickled(converted)):
            actual = candidate(x, src_key_padding_mask=padding)
            assert cosine(actual[~padding], expected[~padding]) > (0.999 if recipe == "int8" else 0.98)
            assert cosine(candidate(x), plain) > (0.999 if recipe == "int8" else 0.98)
            assert cosine(candidate(x, mask=torch.zeros(7, 7)), plain) > (0.999 if recipe == "int8" else 0.98)
        converted.layers[1].linear2.register_forward_hook(lambda module, args, output: calls.append(module))
        converted(x)
    assert calls == [converted.layers[1].linear2]
    assert [layer.activation_relu_or_gelu for layer in model.layers] == switches  # the original is untouched
    reverted = revert_model(converted)
    assert [layer.activation_relu_or_gelu for layer in reverted.layers] == switches
    assert reverted.use_nested_tensor == nested
    assert not any("tilewright" in name for module in reverted.modules() for name in vars(module))


def test_an_encoder_with_nothing_converted_keeps_its_native_path() -> None:
    model = nn.ModuleDict({"encoder": encoder(), "fc": nn.Linear(32, 32)})
    converted = convert_model(model, {"fc": "int8"})
    assert [layer.activation_relu_or_gelu for layer in converted["encoder"].layers] == [1, 1, 1]
    assert converted["encoder"].use_nested_tensor


def test_one_converted_layer_switches_nested_tensors_off_for_the_whole_encoder() -> None:
    converted = convert_model(encoder(), {"layers.2.linear1": "int8"})
    assert [layer.activation_relu_or_gelu for layer in converted.layers] == [1, 1, 0]
    padding = torch.tensor([[False] * 5 + [True] * 2])
    with torch.no_grad():
        assert torch.isfinite(converted(torch.randn(1, 7, 32), src_key_padding_mask=padding)).all()


def test_decoder_layers_convert() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    converted = convert_model(model, "int8")
    assert len(report(converted).converted) == 4 and len(report(converted).skipped) == 4
    assert cosine(converted(x, memory), model(x, memory)) > 0.999


class Counting(Int8Dynamic):
    """Notes how many of the float weights are still alive whenever a layer is made."""

    weights: list[weakref.ref]
    alive: list[int]

    def build(self, module: nn.Module, **calibration: object) -> QuantizedLinear:
        self.alive.append(sum(weight() is not None for weight in self.weights))
        return super().build(module, **calibration)


@pytest.mark.parametrize("calibrated", [False, True])
def test_inplace_frees_layer_by_layer(calibrated: bool) -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    Counting.weights, Counting.alive = [weakref.ref(layer.weight) for layer in model], []
    data = [torch.randn(4, 32)] if calibrated else None
    convert_model(model, Counting(), inplace=True, calibration_data=data)
    assert sorted(set(Counting.alive), reverse=True) == [6, 5, 4, 3, 2, 1]
    assert Counting.alive == sorted(Counting.alive, reverse=True)
    assert not any(weight() is not None for weight in Counting.weights)


MEMORY = """
import ctypes, os, torch
from torch import nn
from tilewright.convert import convert_model

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

convert_model(nn.Sequential(nn.Linear(64, 64)), "int8")  # imports and lazy set-up
layer_bytes = 4 * 3072 * 3072
start = resident()
model = nn.Sequential(*(nn.Linear(3072, 3072) for _ in range(8)))
held = resident() - start
peak = held
original = nn.Module.__setattr__
def watch(self, name, value):
    global peak
    peak = max(peak, resident() - start)
    original(self, name, value)
nn.Module.__setattr__ = watch
convert_model(model, "int8", inplace=True)
nn.Module.__setattr__ = original
ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not held by the model
print(held / layer_bytes, peak / layer_bytes, (resident() - start) / layer_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library has no malloc_trim")
def test_peak_memory_in_place() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    held, peak, after = map(float, done.stdout.split())
    assert 7.9 < held < 9
    # Eight float layers; at the first one also its int8 twin and the temporaries of quantising it.
    assert peak < held + 3.5
    assert after < 8 / 4 + 1


def test_logging_not_printing(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO, logger="tilewright"):
        convert_model(two_layers(), "int8")
    assert "converted 2 layers, 18.3 KiB to 5.1 KiB; 0 left alone" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_the_rest_is_estimated_from_what_is_done() -> None:
    now = 100.0
    rest = Rest({"Fusing": 1.0, "Calibrating": 4.0, "Quantising": 5.0}, clock=lambda: now)
    assert rest.seconds() is None and rest.words() == ""
    now = 106.0
    rest.reached("Fusing", 0.5)
    assert rest.seconds() == pytest.approx(6 * 9.5 / 0.5)
    now = 130.0
    rest.reached("Calibrating", 0.5)  # and so all of the phase before
    assert rest.seconds() == pytest.approx(30 * 7 / 3)
    assert rest.words() == "about 1:10 left"
    rest.reached("Fusing", 1.0)
    rest.reached("of another kind", 1.0)
    assert rest.seconds() == pytest.approx(30 * 7 / 3)
    rest.reached("Quantising", 1.0)
    assert rest.seconds() == 0


def test_the_bar_says_how_long_the_rest_may_take(capfd: pytest.CaptureFixture[str]) -> None:
    rest = Rest({"Half": 1.0, "Other half": 1.0})
    assert list(track(iter(range(3)), "Half", True, rest, total=3)) == [0, 1, 2]
    assert "about 0:00 left" in capfd.readouterr().err
    assert rest.seconds() == pytest.approx(0, abs=30)


@pytest.mark.parametrize("progress, displayed", [(None, False), (False, False), (True, True)])
def test_progress(progress: bool | None, displayed: bool, capfd: pytest.CaptureFixture[str]) -> None:
    convert_model(nn.Sequential(*(nn.Linear(32, 32) for _ in range(30))), "int8", progress=progress)
    written = capfd.readouterr()
    assert written.out == ""
    assert ("Converting" in written.err) == displayed  # stderr is no terminal here


def test_every_phase_that_is_planned_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
            self.head = nn.Linear(16, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.features(x).mean((2, 3)))

    images = [torch.randn(2, 8, 9, 9) for _ in range(3)]
    convert_model(Network().eval(), "int8", calibration_data=images, heads=True, progress=True)
    shown = capfd.readouterr().err
    for phase in ("Fusing", "Calibrating", "Quantising", "Measuring", "Converting", "Trying"):
        assert re.search(rf"{phase} .*100%", shown), phase
    assert "about 0:00 left" in shown.splitlines()[-1] and "Trying" in shown.splitlines()[-1]


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="an nn.Module, not list"):
        convert_model([nn.Linear(4, 4)], "int8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="convert first, then torch.compile"):
        convert_model(torch.compile(two_layers()), "int8")  # type: ignore[arg-type]


def test_a_layer_that_fails_in_place_leaves_a_model_that_works() -> None:
    class Failing(Int8Dynamic):
        def build(self, module: nn.Module, **calibration: object) -> QuantizedLinear:
            if module.out_features == 31:
                raise OSError("no more")
            return super().build(module, **calibration)

    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 31), nn.Linear(31, 32))
    with pytest.raises(RuntimeError, match="converting the layer '1' failed: no more"):
        convert_model(model, Failing(), inplace=True)
    assert [type(module) for module in model] == [Int8Linear, nn.Linear, nn.Linear]
    assert torch.isfinite(model(torch.randn(2, 32))).all()
    assert len(report(model).converted) == 1


def test_errors_of_a_layer_name_it() -> None:
    converted = convert_model(two_layers(), "int4")
    assert isinstance(converted[3], Int4Linear)
    with pytest.raises(ValueError, match="Int4Linear '3' takes input whose last dimension is 48"):
        converted[3](torch.randn(2, 47))
