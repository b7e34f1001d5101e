"""What moves into a convolution, what must not, and what stays of the model."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
from tests.convert.networks import Inception, SmallMobileNet, SmallResNet, SqueezeExcite, conv_bn, settled, source_of
from tilewright.convert.network.program import Program
from tilewright.nn import ConvBnAct2d, FoldedBatchNorm


class Apply(nn.Module):
    """conv -> bn -> whatever ``then`` does with the result and the input."""

    def __init__(self, then: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.conv, self.bn, self.then = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(self.bn(self.conv(x)), x)


def image(channels: int = 4, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, 9, 7)


def agree(model: nn.Module, fused: nn.Module, *inputs: torch.Tensor, factor: float = 1e-5) -> None:
    """Both in and out of the program: the class's own forward must say the same."""
    with torch.no_grad():
        expected = model(*inputs)
        scale = expected.abs().max().item() * factor + 1e-6
        torch.testing.assert_close(fused(*inputs), expected, rtol=0, atol=scale)
        torch.testing.assert_close(fused(*inputs), expected, rtol=0, atol=scale)  # replayed
        torch.testing.assert_close(type(fused).forward(fused, *inputs), expected, rtol=0, atol=scale)


def runs(model: nn.Module) -> list[str]:
    """What is given to each fused convolution, as the program writes it."""
    return [line.split(".run(")[1].split(")")[0] for line in source_of(model).splitlines() if ".run(" in line]


# ---- chains
FORMS: dict[str, tuple[Any, str]] = {
    "F.relu": (lambda y, x: F.relu(y), "relu"),
    "F.relu_inplace": (lambda y, x: F.relu(y, inplace=True), "relu"),
    "torch.relu": (lambda y, x: torch.relu(y), "relu"),
    "x.relu": (lambda y, x: y.relu(), "relu"),
    "x.relu_": (lambda y, x: y.relu_(), "relu"),
    "clamp": (lambda y, x: y.clamp(min=0), "relu"),
    "F.relu6": (lambda y, x: F.relu6(y), "relu6"),
    "F.hardtanh": (lambda y, x: F.hardtanh(y, 0, 6), "relu6"),
    "torch.clamp": (lambda y, x: torch.clamp(y, 0.0, 6.0), "relu6"),
    "F.silu": (lambda y, x: F.silu(y), "silu"),
    "F.gelu": (lambda y, x: F.gelu(y), "gelu"),
    "F.gelu_tanh": (lambda y, x: F.gelu(y, approximate="tanh"), "gelu_tanh"),
    "F.hardswish": (lambda y, x: F.hardswish(y), "hardswish"),
    "F.leaky_relu": (lambda y, x: F.leaky_relu(y, 0.2), "leaky_relu"),
    "add": (lambda y, x: y + x, "none"),
    "add_reversed": (lambda y, x: x + y, "none"),
    "torch.add": (lambda y, x: torch.add(y, x), "none"),
    "x.add_": (lambda y, x: y.add_(x), "none"),
    "operator.iadd": (lambda y, x: operator.iadd(y, x), "none"),
    "add_relu": (lambda y, x: F.relu(y + x), "relu"),
    "add_dropout_silu": (lambda y, x: F.silu(F.dropout(y + x, 0.5, False)), "silu"),
}


@pytest.mark.parametrize("form", FORMS)
def test_functional_forms(form: str) -> None:
    then, activation = FORMS[form]
    model = settled(Apply(then))
    fused = tw.convert_model(model, "fuse")
    x = image()
    agree(model, fused, x)
    (given,) = runs(fused)
    assert f"'{activation}'" in given
    assert ("x, x" in given) == ("add" in form or "+" in form)
    words = [line for line in source_of(fused).splitlines() if " = " in line]
    assert len(words) <= 4, words  # the layer, the call, the layout of the result: nothing else is left


@pytest.mark.parametrize(
    "activation, name",
    [
        *((nn.ReLU(), "relu"), (nn.ReLU6(), "relu6"), (nn.Hardtanh(0, 6), "relu6"), (nn.SiLU(), "silu")),
        *((nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.Hardswish(), "hardswish")),
        (nn.LeakyReLU(0.2), "leaky_relu"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_module_forms(activation: nn.Module, name: str) -> None:
    model = settled(nn.Sequential(*conv_bn(4, 6), activation, *conv_bn(6, 4, 1)))
    fused = tw.convert_model(model, "fuse")
    agree(model, fused, image())
    assert [f"'{name}'" in given for given in runs(fused)] == [True, False]
    assert tw.report(fused).layers[0].scheme == f"fuse + batch-norm + {name}"


@pytest.mark.parametrize(
    "then",
    [
        pytest.param(lambda y, x: torch.add(y, x, alpha=2), id="alpha"),
        pytest.param(lambda y, x: y + 1, id="a number"),
        pytest.param(lambda y, x: y + y, id="to itself"),
        pytest.param(lambda y, x: F.hardtanh(y), id="hardtanh of another range"),
        pytest.param(lambda y, x: F.relu(y) + y, id="read twice"),
        pytest.param(lambda y, x: y.mul_(2) + y, id="multiplied in place and read again"),
    ],
)
def test_what_no_epilogue_does_stays_apart(then: Any) -> None:
    model = settled(Apply(then))
    fused = tw.convert_model(model, "fuse")
    agree(model, fused, image())
    assert runs(fused) == ["x, None, 'none', 0.01, None"]


def test_a_value_that_is_overwritten_is_read_as_overwritten() -> None:
    model = settled(Apply(lambda y, x: F.relu(y, inplace=True) + y))
    fused = tw.convert_model(model, "fuse")
    agree(model, fused, image())
    assert runs(fused) == ["x, None, 'relu', 0.0, None"]


def test_an_addend_may_be_broadcast() -> None:
    """As in a pooled branch: whether shapes agree is not known until the model runs."""
    model = settled(Apply(lambda y, x: F.relu(y + x.mean((2, 3), keepdim=True))))
    agree(model, tw.convert_model(model, "fuse"), image())
    model = settled(Apply(lambda y, x: F.relu(F.adaptive_avg_pool2d(y, 1) + x)))
    agree(model, tw.convert_model(model, "fuse"), image())


def test_odd_shapes_in_one_dimension_too() -> None:
    one = settled(nn.Sequential(nn.Conv1d(3, 6, 5, 3, 2, groups=3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 2, 1)))
    agree(one, tw.convert_model(one, "fuse"), torch.randn(2, 3, 11))
    odd = settled(
        nn.Sequential(nn.Conv2d(1, 6, 3, 3, 2, 2, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1, groups=3))
    )
    fused = tw.convert_model(odd, "fuse")
    agree(odd, fused, torch.randn(2, 1, 7, 5))
    assert fused(torch.randn(0, 1, 7, 5)).shape == odd(torch.randn(0, 1, 7, 5)).shape
    assert fused(torch.ones(1, 7, 5)).shape == odd[2](odd[0](torch.ones(1, 7, 5))).shape


class Padded(nn.Module):
    def __init__(self, pad: Any):
        super().__init__()
        self.pad, self.conv = pad, nn.Conv2d(4, 4, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.pad(x))


@pytest.mark.parametrize(
    "pad, absorbed",
    [
        pytest.param(nn.ZeroPad2d((0, 1, 2, 1)), True, id="ZeroPad2d"),
        pytest.param(nn.ConstantPad2d(1, 0.0), True, id="ConstantPad2d"),
        pytest.param(lambda x: F.pad(x, (0, 1)), True, id="F.pad"),
        pytest.param(lambda x: F.pad(x, (0, -1)), False, id="cropping"),
        pytest.param(lambda x: F.pad(x, (0, 1), value=1.0), False, id="ones"),
        pytest.param(lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), False, id="reflect"),
    ],
)
def test_zeros_around_the_image_become_padding(pad: Any, absorbed: bool) -> None:
    model = Padded(pad).eval()
    fused = tw.convert_model(model, "fuse")
    agree(model, fused, image())
    assert ("x, None" in runs(fused)[0]) == absorbed


# ---- batch-norm
class Shared(nn.Module):
    """One convolution called twice. kind: of what follows."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "same batch-norm":
            return F.relu(self.bn(self.conv(F.relu(self.bn(self.conv(x))))))
        if self.kind == "different batch-norms":
            return self.other(self.conv(F.relu(self.bn(self.conv(x)))))
        if self.kind == "once without":
            return self.conv(F.relu(self.bn(self.conv(x))))
        if self.kind == "batch-norm elsewhere":
            return self.bn(self.conv(x)) + self.bn(x)
        if self.kind == "input read elsewhere":
            y = self.conv(x)
            return self.bn(y) + y
        return self.bn(self.conv(x)) * self.conv.weight.mean()


@pytest.mark.parametrize(
    "kind, note",
    [
        ("same batch-norm", None),
        ("different batch-norms", "called several times, with different batch-norms"),
        ("once without", "called several times"),
        ("batch-norm elsewhere", "its batch-norm is called from elsewhere as well"),
        ("input read elsewhere", ""),
        ("weight read", "forward reads its weight"),
    ],
)
def test_batch_norm_is_folded_only_where_that_is_true_everywhere(kind: str, note: str | None) -> None:
    model = settled(Shared(kind))
    fused = tw.convert_model(model, "fuse")
    assert isinstance(fused.bn, FoldedBatchNorm) == (note is None)
    if kind != "weight read":  # whose layout is now another, but not its mean
        agree(model, fused, image())
    else:
        torch.testing.assert_close(fused(image()), fused(image()), rtol=1, atol=9)
    (layer,) = [layer for layer in tw.report(fused).layers if layer.name == "conv"]
    assert (note or "") in layer.reason
    assert isinstance(model.bn, nn.BatchNorm2d) and isinstance(model.conv, nn.Conv2d)


def test_a_training_batch_norm_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"batch-norm is in training mode \('bn1'.*call model.eval\(\)"):
        tw.convert_model(SmallResNet().train(), "fuse")


def test_a_batch_norm_of_the_batch_is_left_apart() -> None:
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)))
    fused = tw.convert_model(model, "fuse")
    agree(model, fused, image())
    assert "normalises by the batch" in tw.report(fused).layers[0].reason


# ---- whole models
@pytest.mark.parametrize(
    "build, size", [(SmallResNet, 1), (SmallMobileNet, 1), (SqueezeExcite, 12), (Inception, 12)], ids=lambda v: str(v)
)
def test_whole_models(build: type[nn.Module], size: int) -> None:
    model = settled(build())
    fused = tw.convert_model(model, "fuse")
    x = torch.randn(2, size, 16, 16)
    agree(model, fused, x)
    assert type(fused) is type(model)
    assert not any(isinstance(part, (nn.Conv2d, nn.BatchNorm2d)) for part in fused.modules())
    assert not tw.report(fused).untraced
    assert fused(x.contiguous(memory_format=torch.channels_last)).shape == model(x).shape


def test_the_model_keeps_class_attributes_and_the_original() -> None:
    model = settled(SmallResNet())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = tw.convert_model(model, "fuse")
    assert type(fused) is SmallResNet and fused.remark == "kept"
    assert fused.conv1.kernel_size == (3, 3) and fused.layer2[0].conv1.stride == (2, 2)
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "forward" not in vars(model)
    inplace = tw.convert_model(model, "fuse", inplace=True)
    assert inplace is model and isinstance(vars(model)["forward"], Program)


def test_layers_that_are_left_alone_run_as_they_are() -> None:
    model = settled(SmallResNet())
    fused = tw.convert_model(model, "fuse", exclude=["layer1.*", "conv1"])
    agree(model, fused, torch.randn(2, 1, 16, 16))
    assert isinstance(fused.layer1[0].conv1, nn.Conv2d) and isinstance(fused.layer1[0].bn1, nn.BatchNorm2d)
    assert isinstance(fused.layer2[0].conv1, ConvBnAct2d)


def test_a_convolution_at_the_root() -> None:
    conv = nn.Conv2d(4, 4, 3).eval()
    fused = tw.convert_model(conv, "fuse")
    assert isinstance(fused, ConvBnAct2d)
    x = image()
    torch.testing.assert_close(fused(x), conv(x), rtol=1e-5, atol=1e-5)
    assert type(tw.revert_model(fused)) is nn.Conv2d


def test_results_can_be_viewed_as_before() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(4, 4, 3), nn.Linear(4 * 7 * 5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.fc(y.view(y.size(0), -1))

    model = Flat().eval()
    agree(model, tw.convert_model(model, "fuse"), image())
    conv = nn.Sequential(nn.Conv2d(4, 4, 3)).eval()
    assert tw.convert_model(conv, "fuse")(image()).view(2, -1).shape == (2, 140)
