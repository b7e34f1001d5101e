"""Activations that move into the layer before them, and those that must not."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import tilewright as tw
from tests.softplus import registered_softplus
from tilewright.convert.graph.activations import fuse_activations, fused_activations
from tilewright.nn import FusedActivation, QuantizedLinear

softplus = pytest.fixture(registered_softplus)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


def mlp(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), activation, nn.Linear(64, 32)).eval()


class Gated(nn.Module):
    """The MLP of a Llama: the activation is on one of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Twice(nn.Module):
    """What the activation reads is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(32, 32), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return self.act(y) + y


class SharedActivation(nn.Module):
    """One activation module for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(32, 32), nn.Linear(32, 32), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.second(self.act(self.first(x))))


class LayerTwice(nn.Module):
    """One layer, once with and once without the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(32, 32), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.act(self.linear(x)))


class DataDependent(nn.Module):
    """Cannot be traced; remembers what it saw, which tracing must not leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act, self.seen = nn.Linear(32, 32), nn.ReLU(), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return self.act(self.linear(x)) if x.sum() > 0 else self.linear(x)


@pytest.mark.parametrize(
    "activation, name",
    [
        *((nn.ReLU(), "relu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.SiLU(), "silu")),
        *((nn.ReLU6(), "relu6"), (nn.Hardtanh(0, 6), "relu6"), (nn.Hardswish(), "hardswish")),
    ],
    ids=["relu", "gelu", "gelu_tanh", "silu", "relu6", "hardtanh", "hardswish"],
)
@pytest.mark.parametrize("recipe", ["int8", "int8-weight-only", "int4-g32", "int8-int4-g32"])
def test_fused_and_unfused_agree(activation: nn.Module, name: str, recipe: str, x: torch.Tensor) -> None:
    model = mlp(activation)
    fused, unfused = tw.convert_model(model, recipe), tw.convert_model(model, recipe, fuse=False)
    assert fused_activations(fused) == {"1": "0"} and fused[0].activation == name
    assert not fused_activations(unfused) and unfused[0].activation == "none"
    torch.testing.assert_close(fused(x), unfused(x), rtol=1e-5, atol=1e-5)
    assert type(model[1]) is type(activation)
    assert tw.report(fused).layers[0].scheme.endswith(f" + {name}")


def test_the_gate_of_a_gated_mlp_is_fused(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = Gated().eval()
    fused = tw.convert_model(model, "int8")
    assert fused_activations(fused) == {"act": "gate"}
    torch.testing.assert_close(fused(x), tw.convert_model(model, "int8", fuse=False)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Twice, SharedActivation, LayerTwice, DataDependent])
def test_left_alone(kind: type[nn.Module], x: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    converted = tw.convert_model(model, "int8")
    assert not fused_activations(converted)
    assert getattr(converted, "seen", None) is None
    error = (converted(x) - model(x)).norm() / model(x).norm()
    assert error < 0.05


def test_an_activation_that_is_registered_is_fused(softplus: str, x: torch.Tensor) -> None:
    model = mlp(nn.Softplus())
    fused, unfused = tw.convert_model(model, "int8"), tw.convert_model(model, "int8", fuse=False)
    assert fused_activations(fused) == {"1": "0"} and fused[0].activation == softplus
    torch.testing.assert_close(fused(x), unfused(x), rtol=1e-5, atol=1e-5)
    assert not fused_activations(tw.convert_model(mlp(nn.Softplus(beta=2)), "int8"))
    image, network = torch.randn(2, 3, 12, 12), nn.Sequential(nn.Conv2d(3, 16, 3), nn.Softplus()).eval()
    converted = tw.convert_model(network, "fuse")
    assert softplus in tw.report(converted).layers[0].scheme
    torch.testing.assert_close(converted(image), network(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [0, 1], ids=["layer", "activation"])
@pytest.mark.parametrize(
    "kind",
    ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"],
)
def test_no_hook_of_any_kind_is_passed_over(kind: str, place: int) -> None:
    model = mlp(nn.ReLU())
    getattr(model[place], f"register_{kind}")(lambda *_: None)
    assert not fused_activations(tw.convert_model(model, "int8"))


def test_hooks_keep_what_they_watch_apart(x: torch.Tensor) -> None:
    seen: list[torch.Tensor] = []
    model = mlp(nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    converted = tw.convert_model(model, "int8")
    assert not fused_activations(converted)
    converted(x)
    assert (seen[0] < 0).any()


def test_revert_copy_and_second_conversion(x: torch.Tensor) -> None:
    fused = tw.convert_model(mlp(nn.GELU()), "int8")
    twin = copy.deepcopy(fused)
    assert torch.equal(twin(x), fused(x))
    plain = tw.revert_model(fused)
    assert [type(module).__name__ for module in plain] == ["Linear", "GELU", "Linear"]
    assert isinstance(fused[1], FusedActivation)
    torch.testing.assert_close(plain(x), fused(x), rtol=0.05, atol=0.02)
    assert fused_activations(tw.convert_model(plain, "int8")) == {"1": "0"}
    assert not fuse_activations(fused)


def test_save_and_load(tmp_path: Path, x: torch.Tensor) -> None:
    fused = tw.convert_model(mlp(nn.GELU()), "int4-g32")
    tw.save_model(fused, tmp_path)
    loaded = tw.load_model(tmp_path, lambda: mlp(nn.GELU()))
    assert torch.equal(loaded(x), fused(x))
    assert [type(module).__name__ for module in tw.revert_model(loaded)] == ["Linear", "GELU", "Linear"]


@pytest.mark.parametrize(
    "fused, message",
    [({"7": "0"}, "no activation '7'"), ({"1": "7"}, "no converted layer '7'"), ({"1": "2"}, "ends in none")],
)
def test_a_manifest_of_another_model(tmp_path: Path, fused: dict[str, str], message: str) -> None:
    tw.save_model(tw.convert_model(mlp(nn.GELU()), "int8"), tmp_path)
    manifest = json.loads((tmp_path / "tilewright.json").read_text())
    (tmp_path / "tilewright.json").write_text(json.dumps({**manifest, "fused": fused}))
    with pytest.raises(tw.CheckpointError, match=message):
        tw.load_model(tmp_path, lambda: mlp(nn.GELU()))


def test_another_activation_in_the_factory(tmp_path: Path) -> None:
    tw.save_model(tw.convert_model(mlp(nn.GELU()), "int8"), tmp_path)
    with pytest.raises(tw.CheckpointError, match="ends in gelu, but '1' is relu"):
        tw.load_model(tmp_path, lambda: mlp(nn.ReLU()))


# ---- an activation is applied once, however the model was put together
def said(model: nn.Module) -> dict[str, list[str]]:
    """What the state dict says of activations that layers have taken over."""
    metadata = model.state_dict()._metadata
    return {name: each["fused_activation"] for name, each in metadata.items() if "fused_activation" in each}


def rebuilt(model: nn.Module, fresh: nn.Module, **changes: object) -> nn.Module:
    """``fresh`` with layers that are made of the configs of those of ``model``."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            fresh.set_submodule(name, type(layer)(**{**layer.config(), **changes}))
    return fresh


@pytest.mark.parametrize("recipe", ["int8", "int8-weight-only", "int4-g32", "sparse24"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_loaded_by_names(recipe: str, assign: bool, x: torch.Tensor) -> None:
    fused, separate = tw.convert_model(Gated(), recipe), tw.convert_model(Gated(), recipe, fuse=False)
    assert said(fused) == {"gate": ["silu", "act"]} and not said(separate)
    assert fused.state_dict().keys() == separate.state_dict().keys()
    for source in (fused, separate):
        state, expected = source.state_dict(), source(x)
        older = dict(state)
        targets = [tw.convert_model(Gated(), recipe), tw.convert_model(Gated(), recipe, fuse=False)]
        for target in [*targets, rebuilt(fused, Gated()), rebuilt(separate, Gated())]:
            for given in (state, older):
                target.load_state_dict(given, assign=assign)
                torch.testing.assert_close(target(x), expected, rtol=1e-2, atol=1e-3)


def test_a_state_dict_and_a_layer_that_contradict_each_other() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.mlp = inner

    fused = tw.convert_model(Wrapped(Gated()), "int8")
    state = fused.state_dict()
    layer, other = fused.mlp.gate, rebuilt(fused, Wrapped(Gated()))
    other.mlp.gate = type(layer)(**{**layer.config(), "activation": layer.activation})
    with pytest.raises(RuntimeError, match=r"mlp\.gate: .* applies silu in the place of the module 'act'"):
        other.load_state_dict(state)
    gelu = Gated()
    gelu.act = nn.GELU()
    with pytest.raises(RuntimeError, match=r"mlp\.gate: .* applies silu, this one applies gelu"):
        tw.convert_model(Wrapped(gelu), "int8").load_state_dict(state)
    state.pop("mlp.gate.bias")
    with pytest.raises(RuntimeError, match=r"mlp\.gate: .* applies silu, this one applies gelu"):
        tw.convert_model(Wrapped(gelu), "int8").load_state_dict(state, strict=False)


@pytest.mark.parametrize("new", [nn.Linear(32, 64), nn.Sequential(nn.Linear(32, 64)), nn.Identity()])
def test_a_layer_that_is_replaced_took_its_activation_with_it(new: nn.Module, x: torch.Tensor) -> None:
    model = tw.convert_model(Gated(), "int8")
    wrapped = copy.deepcopy(model)
    wrapped.gate = nn.Sequential(wrapped.gate, nn.Identity())  # as adapters wrap layers
    model.gate = new
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), wrapped):  # noqa: S301
        with pytest.raises(RuntimeError, match=r"SiLU\(\) was fused into the layer 'gate' .* fuse=False"):
            each(x)


def test_parts_of_a_fused_model_are_taken_elsewhere(x: torch.Tensor) -> None:
    model = tw.convert_model(mlp(nn.GELU()), "int8")
    expected = model(x)
    assert torch.equal(nn.Sequential(*model)(x), expected)
    assert torch.equal(copy.deepcopy(model[:2])(x), model[:2](x))
    twin = copy.deepcopy(model)
    twin[0] = nn.Linear(32, 64)
    assert torch.equal(model(x), expected), "a copy asks the copy"
    twin = tw.convert_model(mlp(nn.GELU()), "int8")
    place = copy.deepcopy(twin[1])
    twin[1] = place
    assert torch.equal(twin(x), expected)


def test_the_report_names_a_fused_layer_that_was_moved_by_hand() -> None:
    """Its activation may be applied twice there: nobody can tell at the time when it is moved."""
    source, moved, alone = tw.convert_model(Gated(), "int8"), Gated(), nn.Sequential()
    moved.gate, alone.gate = source.gate, source.gate
    kept = tw.convert_model(Gated(), "int8", fuse=False)
    for model, told in ((moved, "here that is a SiLU"), (alone, "there is no such module here")):
        report = tw.report(model)
        (layer,) = [each for each in report.converted if each.name == "gate"]
        assert layer.reason.startswith("it applies silu for the module 'act'") and told in layer.reason
        assert "fuse=False" in str(report).replace("\n", " ")
    for model in (source, kept, source.gate):
        assert not any(layer.reason for layer in tw.report(model).converted)


def test_the_state_dict_is_one_for_all_that_take_one(x: torch.Tensor, tmp_path: Path) -> None:
    model = tw.convert_model(Gated(), "int8")
    state, expected = model.state_dict(), model(x)
    assert torch.equal(torch.func.functional_call(model, state, x), expected)
    torch.save(state, tmp_path / "state.pt")
    tw.convert_model(Gated(), "int8").load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other = Gated()
    other.act = nn.GELU()
    with pytest.raises(RuntimeError, match="applies silu, this one applies gelu"):
        tw.convert_model(other, "int8").load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    saved = get_model_state_dict(model)
    assert saved.keys() == state.keys()
    fresh = tw.convert_model(Gated(), "int8")
    set_model_state_dict(fresh, saved)
    assert torch.equal(fresh(x), expected)
    program = torch.export.export(model.eval(), (x,))
    torch.export.save(program, tmp_path / "program.pt2")
    assert torch.equal(torch.export.load(tmp_path / "program.pt2").module()(x), expected)


def test_what_is_reverted_says_nothing(x: torch.Tensor) -> None:
    plain = tw.revert_model(tw.convert_model(Gated(), "int8"))
    assert not said(plain)
    Gated().load_state_dict(plain.state_dict())
    layer = tw.convert_model(Gated(), "int8", fuse=False).gate
    assert layer.config()["activation"] == "none" and tw.convert_model(Gated(), "int8").gate.activation == "silu"


def test_the_manifest_says_what_was_fused(tmp_path: Path, x: torch.Tensor) -> None:
    model = tw.convert_model(Gated(), "int8")
    tw.save_model(model, tmp_path)
    manifest = json.loads((tmp_path / "tilewright.json").read_text())
    assert manifest["fused"] == {"act": "gate"} and manifest["layers"]["gate"]["config"]["activation"] == "silu"
    loaded = tw.load_model(tmp_path, Gated)
    assert said(loaded) == said(model) == {"gate": ["silu", "act"]} and torch.equal(loaded(x), model(x))
    loaded.load_state_dict(model.state_dict())
