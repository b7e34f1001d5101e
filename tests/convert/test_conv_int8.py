"""Static int8: what is observed, what stays int8 between layers, what it costs in accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
from tests.convert.networks import Inception, SmallMobileNet, SmallResNet, SqueezeExcite, conv_bn, settled, source_of
from tilewright.convert.calibrate.observers import Observer
from tilewright.nn import ConvBnAct2d, Int8ConvBnAct2d, quantized_ops


def sqnr(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal to quantisation noise in decibels."""
    noise = (actual.double() - expected.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / noise))


def images(channels: int = 1, batch: int = 8, size: int = 16) -> torch.Tensor:
    return torch.randn(batch, channels, size, size)


def int8(model: nn.Module, data: Any, **options: Any) -> nn.Module:
    return tw.convert_model(model, tw.Int8Static(**options), calibration_data=data)


# ---- scales
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e6])
def test_an_observer_chooses_what_it_says(observer: str, limit: float) -> None:
    values = torch.randn(40_000) * limit
    values[7] = 30 * limit
    seen = Observer()
    for part in values.split(999):
        seen.add(part)
    scale = seen.scale(observer, 99.9)

    def error(s: float) -> float:
        return float((values - (values / s).round().clamp(-127, 127) * s).square().sum())

    if observer == "minmax":
        assert scale == pytest.approx(values.abs().max().item() / 127)
    elif observer == "percentile":
        assert (values.abs() > 127 * scale).float().mean() == pytest.approx(0.001, abs=3e-4)
    else:
        candidates = torch.linspace(0.02, 1, 300) * values.abs().max().item() / 127
        best = min(error(float(candidate)) for candidate in candidates)
        assert error(scale) < 1.05 * best


def test_observers_of_nothing_and_of_what_is_no_number() -> None:
    seen = Observer()
    seen.add(torch.zeros(5))
    seen.add(torch.zeros(0))
    assert [seen.scale(name) for name in ("minmax", "percentile", "mse")] == [1.0] * 3
    assert [seen.grid(name) for name in ("minmax", "percentile", "mse")] == [(1.0, 0)] * 3
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="NaN or Inf"):
            seen.add(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match="observer must be one of minmax, percentile, mse, not 'max'"):
        tw.Int8Static(observer="max")
    with pytest.raises(ValueError, match="percentile must lie in"):
        tw.Int8Static(percentile=0)
    with pytest.raises(ValueError, match="max_error must be positive"):
        tw.Int8Static(max_error=0)
    with pytest.raises(ValueError, match="symmetric must be True or False, not 'no'"):
        tw.Int8Static(symmetric="no")


# ---- int8 from end to end
@pytest.mark.parametrize(
    "build, channels, quantized",
    [(SmallResNet, 1, 1), (SmallMobileNet, 1, 1), (SqueezeExcite, 12, 2), (Inception, 12, 2)],
    ids=["resnet", "mobilenet", "squeeze_excite", "inception"],
)
@torch.no_grad()
def test_tensors_between_layers_stay_int8(build: type[nn.Module], channels: int, quantized: int) -> None:
    """``quantized``: how often a float tensor becomes int8. Gating is float, so what it gates is quantised again;
    pooling the float input is cheaper than pooling it twice.
    """
    model, x = settled(build()), images(channels)
    converted = int8(model, [x])
    source = source_of(converted)
    assert source.count("quantize(") == quantized
    assert "dequantize(" not in source
    for given in (x, images(channels)):
        assert sqnr(converted(given), model(given)) > 25
    assert sqnr(type(converted).forward(converted, x), model(x)) > 25, "each layer by itself"
    kinds = {type(part) for part in converted.modules()}
    assert Int8ConvBnAct2d in kinds and nn.Conv2d not in kinds and nn.BatchNorm2d not in kinds
    assert (ConvBnAct2d in kinds) == (build is SqueezeExcite), "the gate is exact"


@torch.no_grad()
def test_squeeze_and_excite_is_kept_in_float() -> None:
    reported = tw.report(int8(settled(SqueezeExcite()), [images(12)]))
    float_layers = {layer.name for layer in reported.layers if layer.scheme.startswith("fuse")}
    assert float_layers == {"reduce", "restore"}
    assert all("pooled image of one pixel" in layer.reason for layer in reported.layers if layer.name in float_layers)


class Between(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.first, self.between, self.last = conv_bn(3, 8), between, conv_bn(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(self.first(x)))


@pytest.mark.parametrize(
    "between, stays",
    [
        pytest.param(nn.MaxPool2d(3, 2, 1, ceil_mode=True), True, id="MaxPool2d"),
        pytest.param(lambda x: F.max_pool2d(x, 2), True, id="F.max_pool2d"),
        pytest.param(nn.Dropout(0.5), True, id="Dropout"),
        pytest.param(lambda x: F.max_pool2d(x, 2).relu(), True, id="relu after pooling"),
        pytest.param(nn.ChannelShuffle(2), True, id="ChannelShuffle"),
        pytest.param(lambda x: x.transpose(2, 3), True, id="transpose"),
        pytest.param(lambda x: torch.cat([x, x], 2), True, id="cat"),
        pytest.param(lambda x: F.pad(x, (1, 1, 1, 1)).relu(), True, id="pad"),
        pytest.param(nn.AvgPool2d(2), False, id="AvgPool2d"),
        pytest.param(torch.tanh, False, id="tanh"),
        pytest.param(lambda x: F.interpolate(x, scale_factor=2), False, id="interpolate"),
        pytest.param(lambda x: F.max_pool2d(x, 2, return_indices=True)[0], False, id="max_pool2d with indices"),
    ],
)
@torch.no_grad()
def test_what_passes_int8_on(between: Any, stays: bool) -> None:
    model, x = settled(Between(between)), images(3)
    converted = int8(model, [x])
    assert (source_of(converted).count("quantize(") - source_of(converted).count("dequantize(")) == (1 if stays else 2)
    assert sqnr(converted(x), model(x)) > 30


@torch.no_grad()
def test_one_dimension() -> None:
    norms = (nn.BatchNorm1d(8), nn.BatchNorm1d(4))
    model = nn.Sequential(nn.Conv1d(3, 8, 5, 2, 2), norms[0], nn.ReLU(), nn.Conv1d(8, 4, 3, groups=4), norms[1])
    x = torch.randn(4, 3, 40)
    converted = int8(settled(model), [x])
    assert source_of(converted).count("quantize(") == 1
    assert sqnr(converted(x), model(x)) > 30
    assert converted(x).shape == model(x).shape


@torch.no_grad()
def test_a_layer_called_twice_has_one_scale() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(F.relu(self.conv(x)))

    model, x = Twice().eval(), images(4)
    converted = int8(model, [x], observer="minmax")
    seen = torch.cat([x.flatten(), F.relu(model.conv(x)).flatten()])
    assert converted.conv.x_scale == pytest.approx(float(seen.max() - seen.min()) / 254, rel=0.01)
    assert int8(model, [x], observer="minmax", symmetric=True).conv.x_scale == pytest.approx(seen.abs().max() / 127)
    assert sqnr(converted(x), model(x)) > 30


@torch.no_grad()
def test_max_pooling_of_int8_is_that_of_the_values() -> None:
    for kernel, stride, padding, dilation, ceil in (
        *(
            (3, 2, 1, 1, False),
            (3, 2, 1, 1, True),
            (2, 2, 0, 1, False),
            (2, 3, 1, 2, True),
            ((3, 2), (1, 2), 1, 1, True),
        ),
    ):
        q = torch.randint(-127, 128, (2, 3, 13, 12), dtype=torch.int8)
        expected = F.max_pool2d(q.float(), kernel, stride, padding, dilation, ceil)
        assert torch.equal(quantized_ops.max_pool2d(q, kernel, stride, padding, dilation, ceil).float(), expected)


# ---- calibration data
class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(1, 4), conv_bn(1, 4)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return F.relu(self.a(x) + self.b(other))


@torch.no_grad()
def test_forms_of_calibration_data() -> None:
    model, (x, other) = settled(TwoInputs()), (images(), images())
    forms: list[Any] = [
        [(x, other)],
        [[x, other]],
        [{"x": x, "other": other}],
        iter([(x, other)]),
        ((x[i : i + 4], other[i : i + 4]) for i in (0, 4)),
    ]
    scales = [int8(model, form, observer="minmax").a[0].x_scale for form in forms]
    assert scales == [scales[0]] * len(forms)
    single = settled(SmallResNet())
    assert int8(single, images()[:, None]).conv1.x_scale > 0, "a tensor is an iterable of inputs"
    with pytest.raises(ValueError, match="calibration_data is empty"):
        int8(model, [])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_calibration_data_that_is_no_number_is_named_and_so_is_a_layer_that_makes_it(bad: float) -> None:
    x = images()
    x[3, 0, 5, 5] = bad
    with pytest.raises(ValueError, match=r"calibration_data, item 1, argument 'x': 1 of 2048 values are (NaN|Inf)"):
        int8(settled(SmallResNet()), [images(), x])
    model = settled(SmallResNet())
    model.layer2[0].downsample[0].bias = nn.Parameter(torch.full((32,), bad))
    with pytest.raises(ValueError, match=r"calibration_data, item 0.*NaN or Inf into the layer 'layer2"):
        int8(model, [images()])


@torch.no_grad()
def test_without_calibration_data_convolutions_are_fused_in_float(caplog: pytest.LogCaptureFixture) -> None:
    model, x = settled(SmallResNet()), images()
    converted = tw.convert_model(model, "int8")
    layers = {layer.name: layer for layer in tw.report(converted).layers}
    assert layers["fc"].scheme.split(" ")[0] == "w8a8"
    assert layers["conv1"].scheme == "fuse + batch-norm + relu"
    assert layers["conv1"].reason == "static int8 needs calibration_data: fused in float"
    assert "static int8 needs calibration_data" in caplog.text
    torch.testing.assert_close(converted.layer1[0].conv1.weight_ohwi.flatten(), _folded(model).flatten())
    assert sqnr(converted(x), model(x)) > 30


def _folded(model: nn.Module) -> torch.Tensor:
    return ConvBnAct2d.from_float(model.layer1[0].conv1, model.layer1[0].bn1).weight_ohwi  # type: ignore[union-attr, index, arg-type]


@torch.no_grad()
def test_layers_that_err_too_much_stay_in_float() -> None:
    model, x = settled(SmallMobileNet()), images()
    errors = sorted(layer.output_error for layer in tw.report(int8(model, [x])).converted)
    limit = (errors[-2] + errors[-1]) / 2
    converted = int8(model, [x], max_error=limit)
    kept = [layer for layer in tw.report(converted).layers if layer.scheme.startswith("fuse")]
    assert len(kept) == 1
    assert "kept in float: its output error of" in kept[0].reason and "exceeds max_error" in kept[0].reason
    assert sqnr(converted(x), model(x)) > 25


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(4, 4), conv_bn(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


@torch.no_grad()
def test_layers_outside_of_a_graph_and_layers_not_reached() -> None:
    model, x = settled(Sometimes()), images(4).abs()
    converted = int8(model, [x])
    layers = {layer.name: layer for layer in tw.report(converted).layers}
    assert layers["a.0"].scheme.startswith("w8a8-static")
    assert layers["b.0"].scheme.startswith("fuse")
    assert layers["b.0"].reason == "the calibration data did not reach it: fused in float"
    assert sqnr(converted(x), model(x)) > 35
    torch.testing.assert_close(converted(-x), model(-x), rtol=1e-4, atol=1e-4)

    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.sum() > 0 else x

    loose = settled(Loose())
    converted = int8(loose, [x])
    assert isinstance(converted.conv, Int8ConvBnAct2d)
    assert sqnr(converted(x), loose(x)) > 35


@torch.no_grad()
def test_a_watched_layer_is_quantised_by_itself() -> None:
    model, x = settled(SmallResNet()), images()
    seen: list[torch.Tensor] = []
    model.layer2[0].conv1.register_forward_hook(lambda module, args, y: seen.append(y))
    converted = int8(model, [x])
    seen.clear()
    assert sqnr(converted(x), model(x)) > 25
    assert len(seen) == 2 and all(y.is_floating_point() for y in seen)
    assert isinstance(converted.layer2[0].conv1, Int8ConvBnAct2d)


@torch.no_grad()
def test_half_precision() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model, x = settled(SmallResNet()).to(dtype), images().to(dtype)
        converted = int8(model, [x])
        assert converted(x).dtype == dtype
        assert sqnr(converted(x), model(x)) > 20


# ---- saved and brought back
@pytest.mark.parametrize("recipe", ["fuse", "int8"])
@pytest.mark.parametrize("build, channels", [(SmallResNet, 1), (SqueezeExcite, 12)], ids=["resnet", "squeeze_excite"])
@torch.no_grad()
def test_saved_loaded_and_reverted(recipe: str, build: type[nn.Module], channels: int, tmp_path: Path) -> None:
    model, x = settled(build()), images(channels)
    converted = tw.convert_model(model, recipe, calibration_data=[x] if recipe == "int8" else None)
    tw.save_model(converted, tmp_path)
    loaded = tw.load_model(tmp_path, build)
    assert type(loaded) is type(model) and not loaded.training
    assert source_of(loaded) == source_of(converted)
    assert all(torch.equal(a, loaded.state_dict()[name]) for name, a in converted.state_dict().items())
    assert torch.equal(loaded(x), converted(x))
    assert tw.report(loaded).to_json() == tw.report(converted).to_json()
    reverted = tw.revert_model(loaded)
    kinds = {type(part) for part in reverted.modules()}
    assert nn.Conv2d in kinds and not kinds & {ConvBnAct2d, Int8ConvBnAct2d, nn.BatchNorm2d}
    assert "forward" not in vars(reverted) and "forward" in vars(loaded)
    assert sqnr(reverted(x), model(x)) > (25 if recipe == "int8" else 90)
    again = int8(reverted, [x])
    assert sqnr(again(x), model(x)) > 25


@torch.no_grad()
def test_new_scales_are_used(tmp_path: Path) -> None:
    model, x = settled(SmallResNet()), images()
    converted, other = int8(model, [x]), int8(model, [3 * x])
    for _ in range(3):
        before = converted(x)
    expected = other(x)
    converted.load_state_dict(other.state_dict())
    torch.testing.assert_close(converted(x), expected)
    assert not torch.allclose(converted(x), before)


@pytest.mark.parametrize(
    "factory, message",
    [
        (lambda: SmallResNet(width=8), "layer 'conv1': has out_channels=16, the factory's 8"),
        (lambda: SmallMobileNet(), "has no such layer"),
        (lambda: _without_norm(), "no batch-norm 'bn1' that a convolution could hold"),
    ],
    ids=["width", "model", "norm"],
)
def test_a_checkpoint_of_another_network(factory: Any, message: str, tmp_path: Path) -> None:
    tw.save_model(tw.convert_model(settled(SmallResNet()), "fuse"), tmp_path)
    with pytest.raises(tw.CheckpointError, match=message):
        tw.load_model(tmp_path, factory)


def _without_norm() -> nn.Module:
    model = SmallResNet()
    model.bn1 = nn.Identity()
    return model


# ---- accuracy on real data
def digits() -> Iterator[torch.Tensor]:
    """Training images and labels, test images and labels: 8 x 8 pixels, from scikit-learn's bundled scans."""
    datasets = pytest.importorskip("sklearn.datasets", reason="the extra `hf` is not installed")
    data = datasets.load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    yield from (x[:1000], y[:1000], x[1000:], y[1000:])


def trained(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int = 6) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    "build", [lambda: SmallResNet(width=8, pool=False), lambda: SmallMobileNet(width=8)], ids=["resnet", "mobilenet"]
)
def test_int8_keeps_the_accuracy_on_digits(build: Callable[[], nn.Module]) -> None:
    x, y, test_x, test_y = digits()
    model = trained(build(), x, y)

    def accuracy(candidate: nn.Module) -> float:
        with torch.no_grad():
            return 100 * (candidate(test_x).argmax(1) == test_y).float().mean().item()

    fused = tw.convert_model(model, "fuse")
    quantized = tw.convert_model(model, "int8", calibration_data=x[:256].split(64))
    assert accuracy(model) > 93
    assert accuracy(fused) == accuracy(model)
    assert accuracy(quantized) >= accuracy(model) - 0.5


class BiasOnly(nn.Module):
    """Convolutions without a bias, with one, with a batch-norm; their inputs are not zero on average."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8, bias=False)
        self.plain = nn.Conv1d(8, 8, 1, bias=False)
        self.biased = nn.Conv1d(8, 8, 1)
        self.normed, self.norm = nn.Conv1d(8, 8, 1, bias=False), nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.plain(torch.relu(self.depthwise(x))))
        return self.norm(self.normed(torch.relu(self.biased(y))))


@pytest.mark.parametrize("loaded", [False, True], ids=["converted", "loaded"])
def test_a_bias_that_only_corrects_goes_with_the_rounding(loaded: bool, tmp_path: Path) -> None:
    model = settled(BiasOnly())
    x = torch.rand(4, 8, 40)
    small = tw.convert_model(model, "int8", calibration_data=[x])
    assert all(small.get_submodule(name).bias is not None for name in ("depthwise", "plain", "biased", "normed"))
    if loaded:
        tw.save_model(small, tmp_path)
        small = tw.load_model(tmp_path, lambda: BiasOnly().eval())
    plain = tw.revert_model(small)
    assert plain.depthwise.bias is None and plain.plain.bias is None
    assert plain.biased.bias is not None and plain.normed.bias is not None, "the model needs them"
    torch.testing.assert_close(plain(x), model(x), rtol=0.02, atol=0.02)
    without = tw.convert_model(model, "int8", calibration_data=[x], exclude="normed")
    BiasOnly().load_state_dict(tw.revert_model(without).state_dict())


@pytest.mark.parametrize("how", ["trained", "set"])
def test_a_bias_that_the_user_gives_stays(how: str) -> None:
    small = tw.convert_model(settled(BiasOnly()), "int8", calibration_data=[torch.rand(4, 8, 40)])
    if how == "trained":
        small.plain._parameters["bias"].requires_grad_()
    else:
        small.plain.bias = nn.Parameter(torch.ones(8))
    assert tw.revert_model(small).plain.bias is not None
