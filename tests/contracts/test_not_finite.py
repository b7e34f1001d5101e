"""What is not finite in a sample makes that sample's results NaN and no other sample's, whatever holds int8 in between.

int8 has no place for NaN or an infinity: without marks a static network takes a NaN for 0 and answers with confidence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
from tests.convert.networks import Inception, SmallMobileNet, SmallResNet, SqueezeExcite, programs_of, settled

BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
each_bad = pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
#: Of an image [C, H, W]: the first value, one within, the last.
PLACES = {"first": (0, 0, 0), "inside": (1, 5, 3), "last": (-1, -1, -1)}


def conv(c_in: int, c_out: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, **options)


class TwoInputs(nn.Module):
    """One of them is only added: by a convolution whose result is int8."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 8), conv(8, 5)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.b(F.relu(self.a(x))) + other)
        return self.c(y).mean((2, 3))


class AddsFloats(nn.Module):
    """The sum of an int8 and a float tensor, which no convolution takes over, in int8."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 3), conv(3, 5)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.b(F.max_pool2d(F.relu(self.a(x)), 2) + other).flatten(1)


class FloatInBetween(nn.Module):
    """Two regions of int8 and something between them that makes infinities of large values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(conv(3, 8), nn.ReLU()), nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 4))
        self.limit = nn.Parameter(torch.tensor(1e9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(y / (y < self.limit)).mean((2, 3))


class Turned(nn.Module):
    """Parts, slices and another number of samples while int8, then samples that are averaged over."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(4, 8), conv(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, _, h, w = x.shape
        left, right = F.relu(self.a(x)).chunk(2, 1)
        y = F.relu(self.b(torch.cat([left, right], 1).reshape(2 * n, 4, h, w)[:, :, 1:]))
        y = self.c(y.reshape(n, 16, h - 1, w))
        return y.mean((2, 3))


class Signal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.a(x))).mean(2)


def plain() -> nn.Module:
    layers = (conv(3, 16), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), conv(16, 16, groups=16), nn.Hardswish())
    return nn.Sequential(*layers, conv(16, 16), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def to_float() -> nn.Module:
    """Its last layer gives an image."""
    return nn.Sequential(conv(3, 8), nn.LeakyReLU(0.1), conv(8, 3), nn.Sigmoid())


IMAGE = (3, 12, 12)
#: The network, and the shapes of its inputs without the batch.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "plain": (plain, (IMAGE,)),
    "image": (to_float, (IMAGE,)),
    "resnet": (lambda: SmallResNet(3), (IMAGE,)),
    "mobilenet": (lambda: SmallMobileNet(3), (IMAGE,)),
    "squeeze-excite": (SqueezeExcite, ((12, 8, 8),)),
    "inception": (Inception, ((12, 8, 8),)),
    "turned": (Turned, (IMAGE,)),
    "signal": (Signal, ((3, 32),)),
    "added": (TwoInputs, (IMAGE, (8, 12, 12))),
    "sum": (AddsFloats, (IMAGE, (3, 6, 6))),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def converted(name: str, **options: Any) -> tuple[nn.Module, list[torch.Tensor]]:
    """An int8 network and a batch of inputs."""
    torch.manual_seed(0)
    build, shapes = NETWORKS[name]
    inputs = [torch.randn(4, *shape) for shape in shapes]
    data = [tuple(x.clone() for x in inputs)]
    model = tw.convert_model(settled(build()), "int8", calibration_data=data, progress=False, **options)
    assert any(layer.scheme.startswith("w8a8-static") for layer in tw.report(model).layers)
    return model, inputs


def spoilt(x: torch.Tensor, sample: int, place: tuple[int, ...], bad: float) -> torch.Tensor:
    x = x.clone()
    x[(sample, *place[3 - (x.dim() - 1) :])] = bad
    return x


def check(y: torch.Tensor, clean: torch.Tensor, sample: int) -> None:
    """The results of one sample are NaN, all others are what they were."""
    others = [i for i in range(len(y)) if i != sample % len(y)]
    assert y[sample].isnan().all()
    assert clean.isfinite().all() and torch.equal(y[others], clean[others])


@each_network
@each_bad
@torch.no_grad()
def test_a_network(name: str, bad: float) -> None:
    """Calls 1 to 4: the second records, later ones replay. A call before was on finite inputs, or was not."""
    for meets_bad_first in (True, False):
        model, inputs = converted(name)
        clean = model(*inputs) if not meets_bad_first else None
        given = [(k, sample, place) for k in range(len(inputs)) for sample, place in ((1, "first"), (-1, "last"))]
        for k, sample, place in given:
            for _ in range(4):
                bad_inputs = [spoilt(x, sample, PLACES[place], bad) if i == k else x for i, x in enumerate(inputs)]
                y = model(*bad_inputs)
                assert y[sample].isnan().all()
            clean = model(*inputs)
            check(y, clean, sample)
        assert all(program.refused is None for program in programs_of(model).values())


@each_bad
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_however_it_is_called(layout: str, mode: Any, place: tuple[int, ...], bad: float) -> None:
    model, (x,) = converted("plain")
    for batch in (4, 1):
        given = spoilt(x[:batch], batch - 1, place, bad)
        if layout == "channels_last":
            given = given.contiguous(memory_format=torch.channels_last)
        elif layout == "strided":
            given = torch.stack([given, torch.full_like(given, torch.nan)], -1)[..., 0]
        with mode():
            for _ in range(3):
                clean, y = model(x[:batch]), model(given)
            check(y.detach(), clean.detach(), batch - 1)


@each_bad
@torch.no_grad()
def test_what_becomes_infinite_in_the_middle(bad: float) -> None:
    torch.manual_seed(0)
    x, inner = torch.randn(4, *IMAGE), FloatInBetween().eval()
    model = tw.convert_model(inner, "int8", calibration_data=[x], progress=False)
    limits = model.limit
    for _ in range(3):
        clean = model(x)
        limits.fill_(0.5)  # what is larger is divided by 0
        y = model(torch.cat([x[:2] * 1e-3, x[2:]]))
        limits.fill_(1e9)
        assert clean.isfinite().all()
        assert y[2:].isnan().all() and y[:2].isfinite().all()


@each_bad
@torch.no_grad()
@pytest.mark.parametrize("calls", [0, 4], ids=["layer by layer", "in pieces"])
def test_with_a_hook_inside(bad: float, calls: int) -> None:
    """Without a program, and around the module that the hook watches."""
    model, (x,) = converted("plain")
    for place in PLACES.values():
        handle = model[0].register_forward_hook(lambda *_: None)
        for _ in range(calls):
            model(x)
        check(model(spoilt(x, 2, place, bad)), model(x), 2)
        handle.remove()


@torch.no_grad()
def test_an_image_without_a_batch() -> None:
    model, (x,) = converted("image")
    for _ in range(3):
        clean, y = model(x[0]), model(spoilt(x, 0, (0, 3, 3), torch.nan)[0])
        assert clean.isfinite().all() and y.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_network_in_half_precision(dtype: torch.dtype) -> None:
    model, (x,) = converted("plain")
    model, x = model.to(dtype), x.to(dtype)
    for _ in range(3):
        check(model(spoilt(x, 1, (0, 0, 0), torch.inf)), model(x), 1)


@pytest.mark.parametrize("backend", ["tilewright", "inductor", "eager"])
@pytest.mark.parametrize("name", ["plain", "squeeze-excite", "turned"])
@torch.no_grad()
def test_compiled_networks(name: str, backend: str) -> None:
    torch.compiler.reset()  # of what earlier models left, there may only be so much
    model, inputs = converted(name)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for bad in BAD.values():
        for _ in range(3):
            y, clean = compiled(spoilt(inputs[0], 2, (0, 0, 0), bad)), compiled(*inputs)
        check(y, clean, 2)


# ---- linear layers
def static_linear(activation: str = "none") -> nn.Module:
    return tw.nn.Int8StaticLinear.from_float(nn.Linear(40, 24), input_scale=0.03, activation=activation)


@each_bad
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "relu6", "hardswish"])
def test_rows_of_a_static_linear_layer(activation: str, bad: float) -> None:
    layer, x = static_linear(activation), torch.randn(2, 3, 40)
    for wanted in (False, True):
        for row, column in ((0, 0), (5, 39), (2, 17)):
            given = x.flatten(0, 1).clone()
            given[row, column] = bad
            given = given.view(2, 3, 40).requires_grad_(wanted)
            for shape in ((2, 3, 40), (6, 40), (1, 2, 3, 40)):
                y, clean = layer(given.view(shape)).detach(), layer(x.view(shape).requires_grad_(wanted)).detach()
                check(y.flatten(0, -2), clean.flatten(0, -2), row)
        assert layer(given.view(6, 40)[2]).isnan().all() and layer(x.view(6, 40)[2]).isfinite().all()


@pytest.mark.parametrize("backend", ["tilewright", "inductor"])
@torch.no_grad()
def test_rows_of_compiled_static_linear_layers(backend: str) -> None:
    torch.compiler.reset()
    layer, x = nn.Sequential(static_linear("relu"), nn.LayerNorm(24)), torch.randn(6, 40)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for bad in BAD.values():
        check(compiled(spoilt(x, 3, (0, 0, 7), bad)), compiled(x), 3)


# ---- float layers with an activation fused in
ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_nan_stays_where_a_plain_layer_has_it(activation: str, dtype: torch.dtype) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(16, 16), conv(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = ACTIVATIONS[activation](self.a(x))
            y = ACTIVATIONS[activation](self.b(y) + x)
            return ACTIVATIONS[activation](self.c(y.transpose(1, 3)))

    torch.manual_seed(0)
    model, x = Network().eval().to(dtype), torch.randn(2, 16, 9, 9).to(dtype)
    fused = tw.convert_model(model, "fuse", progress=False)
    x[1, 2, 0, 4] = torch.nan
    expected = model(x).isnan()
    assert expected.any() and not expected.all()
    for _ in range(3):
        assert torch.equal(fused(x).isnan(), expected)
    torch.compiler.reset()
    with torch.inference_mode():
        compiled = torch.compile(model, backend="tilewright")
        assert torch.equal(compiled(x).isnan(), expected)
