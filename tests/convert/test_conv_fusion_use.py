"""A converted convolutional model in use: other arguments, modes, hooks, what does not trace, copies and graphs."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
from tests.convert.networks import SmallMobileNet, SmallResNet, conv_bn, settled
from tests.convert.test_conv_fusion import agree, image
from tilewright.convert.network.program import Program
from tilewright.nn import ConvBnAct2d


# ---- arguments, modes, later changes
class Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(4, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0, other: torch.Tensor | None = None) -> Any:
        y = F.relu(self.block(x)) * scale
        return {"y": y} if other is None else {"y": y + other}


def test_other_arguments_than_the_defaults_run_the_class_s_forward() -> None:
    model = settled(Options())
    fused, x = tw.convert_model(model, "fuse"), image()
    for args, kwargs in (
        *(((x,), {}), ((), {"x": x}), ((x, 1.0), {}), ((x,), {"other": None})),
        *(((x, 3.0), {}), ((x,), {"scale": 3.0}), ((x,), {"other": x}), ((x, 2.0, x), {})),
    ):
        torch.testing.assert_close(fused(*args, **kwargs)["y"], model(*args, **kwargs)["y"], rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="nonsense"):
        fused(x, nonsense=1)


class Picky(nn.Module):
    """Asks about the shape, as models do that check their input."""

    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 4:
            raise ValueError("four channels, please")
        return F.relu(self.block(x)) if x.shape[-1] > 100 else self.block(x)


def test_questions_about_shapes_are_asked_again() -> None:
    model = settled(Picky())
    fused = tw.convert_model(model, "fuse")
    agree(model, fused, image())
    agree(model, fused, torch.randn(1, 4, 3, 101))
    with pytest.raises(ValueError, match="four channels, please"):
        fused(image(5))


def test_training_mode_runs_the_class_s_forward() -> None:
    model = settled(SmallMobileNet())
    fused, x = tw.convert_model(model, "fuse"), torch.randn(2, 1, 16, 16)
    quiet = fused(x)
    fused.train()
    assert not torch.equal(fused(x), fused(x)), "dropout"
    fused.eval()
    torch.testing.assert_close(fused(x), quiet)


def test_gradients_reach_weights_and_input() -> None:
    fused, x = tw.convert_model(settled(SmallResNet()), "fuse"), torch.randn(2, 1, 16, 16, requires_grad=True)
    for _ in range(3):  # a recording must not take the place of what has a gradient
        fused(x).sum().backward()
    assert x.grad is not None and fused.conv1.weight.grad is not None
    assert (fused.layer2[1].conv2.weight.grad != 0).any()


def test_hooks_before_and_after_the_conversion() -> None:
    model, x = settled(SmallResNet()), torch.randn(2, 1, 16, 16)
    seen: dict[str, torch.Tensor] = {}
    model.layer1[0].register_forward_hook(lambda module, args, y: seen.update(block=y))
    model.layer2[0].conv1.register_forward_hook(lambda module, args, y: seen.update(conv=y))
    model(x)
    expected = {name: value.clone() for name, value in seen.items()}
    fused = tw.convert_model(model, "fuse")
    for _ in range(3):
        seen.clear()
        with torch.no_grad():
            fused(x)
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(fused.layer2[0].bn1, nn.BatchNorm2d), "a hook watches what it reads"
    layers = {layer.name: layer for layer in tw.report(fused).layers}
    assert "a hook watches it" in layers["layer2.0.conv1"].reason
    later: list[str] = []
    handle = fused.layer1[1].register_forward_hook(lambda *_: later.append("layer1.1"))
    fc = fused.fc.register_forward_hook(lambda *_: later.append("fc"))
    with torch.no_grad():
        y = fused(x)
    assert later == ["layer1.1", "fc"]
    handle.remove()
    fc.remove()
    torch.testing.assert_close(fused(x), y, rtol=1e-4, atol=1e-4)
    assert len(later) == 2


def test_what_is_replaced_later_is_used() -> None:
    fused, x = tw.convert_model(settled(SmallResNet()), "fuse"), torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        for _ in range(3):
            fused(x)
        fused.fc.weight.zero_()
        assert torch.equal(fused(x), fused.fc.bias.expand(2, 10))
        fused.fc.bias = nn.Parameter(torch.ones(10))
        assert torch.equal(fused(x), torch.ones(2, 10))
        fused.fc = nn.Linear(32, 3)
        assert fused(x).shape == (2, 3)
        fused.layer2 = nn.Identity()
        with pytest.raises(RuntimeError):
            fused(x)


# ---- what does not trace
class Branching(nn.Module):
    """Its own code does not trace; the blocks it calls do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.loose = conv_bn(4, 4), conv_bn(4, 4), nn.Conv2d(4, 4, 1)
        self.seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        y = self.a(x)
        return self.loose(self.b(y)) if y.sum() > 0 else self.loose(y)


def test_parts_of_what_does_not_trace() -> None:
    model = settled(nn.Sequential(conv_bn(4, 4), Branching(), conv_bn(4, 4), nn.ReLU()))
    fused = tw.convert_model(model, "fuse")
    for sign in (1, -1):
        agree(model, fused, image() * sign)
    assert fused[1].seen is not None
    assert isinstance(vars(fused)["forward"], Program), "the root traces, with one opaque part"
    assert isinstance(vars(fused[1].a)["forward"], Program) and "forward" not in vars(fused[1])
    reported = tw.report(fused)
    assert list(reported.untraced) == ["1"]
    assert "1 does not trace: TraceError" in str(reported)
    assert {layer.name for layer in reported.converted} == {"0.0", "1.a.0", "1.b.0", "1.loose", "2.0"}


class TwoInputs(nn.Module):
    """Traces with its first input alone, and is called with both."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_bn(4, 4), nn.ReLU(), conv_bn(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        z = self.encoder(x).mean((2, 3))
        return self.head(z if y is None else z + y)


def test_a_model_is_read_as_the_calibration_data_calls_it(tmp_path: Path) -> None:
    model = settled(TwoInputs())
    given = (image(), torch.randn(len(image()), 4))
    fused = tw.convert_model(model, "fuse")
    assert isinstance(vars(fused)["forward"], Program)
    converted = tw.convert_model(model, "int8", calibration_data=iter([given, given]))
    assert "forward" not in vars(converted)
    assert isinstance(vars(converted.encoder)["forward"], Program)
    assert list(tw.report(converted).untraced) == [""] and "called with another y" in str(tw.report(converted))
    schemes = {layer.name: layer.scheme for layer in tw.report(converted).converted}
    assert schemes == {"encoder.0.0": "w8a8-static + batch-norm + relu", "encoder.2.0": "w8a8-static + batch-norm"}
    for arguments in (given, given[:1]):
        expected = model(*arguments)
        assert (converted(*arguments) - expected).norm() < 0.05 * expected.norm()
    tw.save_model(converted, tmp_path)
    loaded = tw.load_model(tmp_path, lambda: TwoInputs())
    assert torch.equal(loaded(*given), converted(*given))
    assert vars(loaded.encoder)["forward"].source == vars(converted.encoder)["forward"].source


class OwnForward(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    "layer, reason",
    [
        (lambda: nn.ConvTranspose2d(4, 4, 2), "transposed convolutions have no fused kernel"),
        (lambda: nn.Conv3d(4, 4, 1), "only one- and two-dimensional convolutions"),
        (lambda: nn.Conv2d(4, 4, 1, padding_mode="reflect"), "padding_mode='reflect'"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), "its weight is parametrized"),
        (lambda: OwnForward(4, 4, 1), "OwnForward is a subclass of Conv2d with a forward of its own"),
        (lambda: nn.Conv2d(4, 4, 1).double(), "its weight is float64"),
        (lambda: nn.LazyConv2d(4, 1), "it is lazy"),
    ],
    ids=["transposed", "3d", "reflect", "parametrized", "subclass", "float64", "lazy"],
)
def test_what_is_skipped_says_why(layer: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        tw.convert_model(nn.Sequential(layer()).eval(), "fuse")


# ---- copies, graphs
def test_copies_pickles_and_second_conversions() -> None:
    model, x = settled(SmallResNet()), torch.randn(2, 1, 16, 16)
    fused = tw.convert_model(model, "fuse")
    with torch.no_grad():
        y = fused(x)
        for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):  # noqa: S301 (just pickled here)
            assert isinstance(vars(twin)["forward"], Program) and vars(twin)["forward"].owner is twin
            torch.testing.assert_close(twin(x), y, rtol=1e-5, atol=1e-5)
            twin.conv1.weight.zero_()
            twin.conv1.bias.zero_()
            assert (twin(x) - y).norm() > 1e-3 * y.norm()
        both = tw.convert_model(fused, "int8-weight-only")
        assert type(both.fc).__name__ == "Int8WeightOnlyLinear" and isinstance(both.conv1, ConvBnAct2d)
        assert tw.report(both).totals["layers_converted"] == 11
        assert (both(x) - y).norm() < 0.02 * y.norm()
    with pytest.raises(ValueError, match="already converted"):
        tw.convert_model(fused, "fuse")


@pytest.mark.parametrize("recipe", ["fuse", "int8"])
def test_compiled_and_exported(recipe: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 1, 16, 16)
    model = tw.convert_model(settled(SmallResNet()), recipe, calibration_data=[x] if recipe == "int8" else None)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for batch in (2, 3):
            given = torch.randn(batch, 1, 16, 16)
            torch.testing.assert_close(compiled(given), model(given))
        exported = torch.export.export(model, (x,))
        torch.testing.assert_close(exported.module()(x), model(x))
    assert set(exported.state_dict) <= set(model.state_dict())


@torch.no_grad()
def test_samples_that_a_graph_was_not_made_for_are_observed_too() -> None:
    """Its layers run one by one for them, and a scale must hold what comes to them there."""

    class Choosy(SmallResNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * 2 if x.shape[0] > 1 else x / 2)

    plain, choosy, x = settled(SmallResNet()), settled(Choosy()), torch.randn(4, 1, 16, 16)
    choosy.load_state_dict(plain.state_dict())
    small = tw.convert_model(choosy, "int8", calibration_data=[x[:1], x])
    expected = tw.convert_model(plain, "int8", calibration_data=[x[:1] / 2, x * 2])
    scales, wanted = ({n: v for n, v in each.named_buffers() if "input_scale" in n} for each in (small, expected))
    assert scales.keys() == wanted.keys() and scales
    for name, scale in scales.items():
        torch.testing.assert_close(scale, wanted[name], rtol=0.1, atol=0)
    y = choosy(x)
    assert (small(x) - y).norm() < 0.06 * y.norm()
