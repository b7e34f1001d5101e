"""What is written into ``layer.weight`` of a drop-in layer is stored as its format can, or refused in words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.contracts.convolutions import CONVOLUTIONS
from tests.contracts.layers import LAYERS, K, N
from tests.contracts.weights import (
    assert_computes_what_it_stores,
    assert_stores,
    each_layer,
    each_mode,
    input_of,
    made,
    plain_weight,
    stored,
)
from tilewright.kernels.formats import sparse24
from tilewright.nn import ConvBnAct2d, Sparse24Linear


# ---- writing
def set_data(layer: Any, w: torch.Tensor) -> None:
    layer.weight.data = 2 * w


def add_to_data(layer: Any, w: torch.Tensor) -> None:
    layer.weight.data += w


def assign(layer: Any, w: torch.Tensor) -> None:
    layer.weight = nn.Parameter(2 * w)


def assign_tensor(layer: Any, w: torch.Tensor) -> None:
    layer.weight = 2 * w


def double_rows(layer: Any, w: torch.Tensor) -> None:
    for row in layer.weight:
        row.mul_(2)


def double_blocks(layer: Any, w: torch.Tensor) -> None:
    data = layer.weight.data
    for i in range(0, len(w), 4):
        data[i : i + 4].copy_(2 * w[i : i + 4])


def index_put(layer: Any, w: torch.Tensor) -> None:
    layer.weight[torch.arange(len(w))] = 2 * w


def out(layer: Any, w: torch.Tensor) -> None:
    torch.mul(w, 2, out=layer.weight)


def augmented(layer: Any, w: torch.Tensor) -> None:
    layer.weight *= 2


def of_itself(layer: Any, w: torch.Tensor) -> None:
    layer.weight.add_(layer.weight)


WRITES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "mul_": lambda layer, w: layer.weight.mul_(2),
    "copy_": lambda layer, w: layer.weight.copy_(2 * w),
    "copy_ of another dtype": lambda layer, w: layer.weight.copy_(2 * w.double()),
    "data.mul_": lambda layer, w: layer.weight.data.mul_(2),
    "detach.add_": lambda layer, w: layer.weight.detach().add_(w),
    "transposed": lambda layer, w: layer.weight.data.transpose(0, 1).mul_(2),
    "flat": lambda layer, w: layer.weight.view(-1).mul_(2),
    "setitem": lambda layer, w: layer.weight.__setitem__(slice(None), 2 * w),
    "foreach": lambda layer, w: torch._foreach_mul_([layer.weight], 2),
    "below autograd": lambda layer, w: torch.ops.aten.mul_(layer.weight, 2),
    **{each.__name__: each for each in (set_data, add_to_data, assign, assign_tensor, double_rows, double_blocks)},
    **{each.__name__: each for each in (index_put, out, augmented, of_itself)},
}


@each_layer
@each_mode
@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_what_is_written_is_stored(name: str, write: Any, mode: Any) -> None:
    layer = made(name)
    if name == "int8-transposed" and write in (double_rows, double_blocks):
        pytest.skip("its rows are the columns of what is stored: one after the other they are rounded every time")
    x, weight = input_of(layer), plain_weight(layer).clone()
    kept = {each: value for each, value in stored(layer).items() if each in ("bias", "channel_scale", "input_scale")}
    with mode():
        for _ in range(3):
            before = layer(x)
        write(layer, weight)
        assert_stores(layer, 2 * weight)
        assert not torch.equal(layer(x), before)
        assert_computes_what_it_stores(layer, x)
    assert all(torch.equal(stored(layer)[each], value) for each, value in kept.items())


@each_layer
@torch.no_grad()
def test_twice_the_weight_is_stored_without_rounding_again(name: str) -> None:
    layer = made(name)
    weight = plain_weight(layer).clone()
    layer.weight.mul_(2)
    if layer.dtype == torch.float32:
        torch.testing.assert_close(layer.weight.clone(), 2 * weight, rtol=1e-6, atol=1e-7)
    layer.weight.mul_(0.25)
    layer.weight.mul_(2)
    if layer.dtype == torch.float32:
        torch.testing.assert_close(layer.weight.clone(), weight, rtol=1e-6, atol=1e-7)


@each_layer
@torch.no_grad()
def test_rows_that_are_not_written_stay_as_they_are(name: str) -> None:
    layer = made(name)
    weight = plain_weight(layer).clone()
    before = stored(layer)
    layer.weight.add_(0)
    layer.weight.copy_(weight)
    layer.weight = nn.Parameter(weight)
    assert all(torch.equal(value, before[each]) for each, value in stored(layer).items()), "nothing was written"
    layer.weight[2] = 0
    assert torch.equal(layer.weight[2], torch.zeros_like(weight[2]))
    if name != "int8-transposed":  # whose row is a column
        others = torch.arange(len(weight)) != 2
        assert torch.equal(layer.weight[others], weight[others])


@each_layer
@torch.no_grad()
def test_init_fills_it(name: str) -> None:
    if "sparse24" in name:
        pytest.skip("what init fills a 2:4 weight with is pruned, which has a test of its own")
    layer, x = made(name), input_of(made(name))
    for _ in range(3):
        layer(x)
    for init in (nn.init.xavier_uniform_, nn.init.zeros_, nn.init.ones_, lambda w: nn.init.normal_(w, std=3)):
        torch.manual_seed(3)
        init(layer.weight)
        torch.manual_seed(3)
        assert_stores(layer, init(plain_weight(layer).clone()))  # type: ignore[operator]
        assert_computes_what_it_stores(layer, x)


@pytest.mark.parametrize("layer", LAYERS, ids=[layer.name for layer in LAYERS])
def test_assigning_quantises_as_the_layer_was_quantised(layer: Any) -> None:
    """Range search and group size are the layer's, not the defaults."""
    for search in ("minmax", "mse"):
        if layer.cls is Sparse24Linear and search == "mse":
            continue
        options = {} if layer.cls is Sparse24Linear else {"range_search": search}
        linear, other = layer.linear(), layer.linear()
        torch.manual_seed(5)
        module = layer.quantize(linear, **options)
        torch.manual_seed(5)
        expected = layer.quantize(other, **options)
        module.weight = other.weight
        module.bias = other.bias
        assert module.state_dict().keys() == expected.state_dict().keys()
        assert all(map(torch.equal, module.state_dict().values(), expected.state_dict().values()))
        again = type(module)(**module.config())
        assert again.range_search == module.range_search and again.config() == module.config()


@pytest.mark.parametrize("each", CONVOLUTIONS, ids=[each.name for each in CONVOLUTIONS])
def test_assigning_to_a_convolution_quantises_as_it_was_quantised(each: Any) -> None:
    conv, _ = each.plain()
    other, _ = each.plain()
    module, expected = each.fuse(conv, None), each.fuse(other, None)
    module.weight, module.bias = other.weight, expected.bias
    assert all(map(torch.equal, module.state_dict().values(), expected.state_dict().values()))
    again = type(module)(**module.config())
    assert again.range_search == module.range_search and again.config() == module.config()


# ---- refused
@each_layer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@torch.no_grad()
def test_a_weight_that_is_not_finite_is_refused_in_words(name: str, bad: float) -> None:
    layer = made(name)
    if isinstance(layer, ConvBnAct2d):
        pytest.skip("a float weight may hold anything")
    before = stored(layer)

    def set_one() -> None:
        layer.weight[0, 1] = bad

    def set_all() -> None:
        layer.weight = torch.full_like(layer.weight, bad)

    for write in (set_one, set_all, lambda: layer.weight.fill_(bad), lambda: layer.weight.data.mul_(bad)):
        with pytest.raises(ValueError, match=r"'fc' cannot store the weight that was written: .*must be finite"):
            write()
    assert all(torch.equal(value, before[each]) for each, value in stored(layer).items())
    assert torch.equal(layer.weight, plain_weight(layer))


@each_layer
def test_what_does_not_fit_is_refused_in_words(name: str) -> None:
    layer = made(name)
    weight, before = plain_weight(layer), stored(layer)
    for new, kind, message in (
        (weight[1:], ValueError, "the weight of .*'fc' must have shape"),
        (weight.double(), TypeError, "'fc' is torch.(float32|bfloat16), not torch.float64: cast it first"),
        (weight.to(torch.int8), TypeError, "not torch.int8"),
        (weight.to("meta"), ValueError, "'fc' is on cpu, not on meta"),
        (None, TypeError, "'fc' must be a tensor, not NoneType"),
    ):
        with pytest.raises(kind, match=message):
            layer.weight = new
        if new is not None:
            with pytest.raises(kind, match=message):
                layer.weight.data = new
    for parameter_of in (lambda: nn.Parameter(layer.weight), lambda: nn.Parameter(layer.weight.data)):
        with pytest.raises(RuntimeError, match=r"'fc' is made of what the layer stores \(weight_.*clone\(\)"):
            parameter_of()
    assert isinstance(nn.Parameter(layer.weight.clone()), nn.Parameter)
    for change in (
        lambda: layer.weight.data.resize_(3),
        lambda: layer.weight.set_(torch.zeros(3, dtype=weight.dtype)),
        lambda: layer.weight.data.unsqueeze_(0),
    ):
        with torch.no_grad(), pytest.raises(RuntimeError, match="'fc' keeps its size and its memory: use copy_"):
            change()
    with pytest.raises(AttributeError):
        del layer.weight
    assert all(torch.equal(value, before[each]) for each, value in stored(layer).items())
    assert torch.equal(layer.weight, weight)


@each_layer
def test_a_gradient_that_would_be_lost_is_refused_in_words(name: str) -> None:
    layer = made(name)
    delta = torch.ones_like(plain_weight(layer)).requires_grad_()
    with pytest.raises(RuntimeError, match="'fc' is stored in another form, which would lose its gradient"):
        layer.weight.detach().add_(delta)
    with pytest.raises(RuntimeError, match="'fc' is stored in another form, outside of any graph"):
        layer.weight = delta * 2
    assert torch.equal(layer.weight, plain_weight(layer))
    if not isinstance(layer, ConvBnAct2d):
        with pytest.raises(RuntimeError, match="can be no parameter"):
            layer.weight.requires_grad = True
        layer.weight.requires_grad_(False)


@torch.no_grad()
def test_what_is_dropped_of_a_weight_that_is_not_24_is_said() -> None:
    linear = nn.Linear(K, N)
    layer = Sparse24Linear.from_float(linear, values_dtype=None, compute_dtype=None)
    layer.layer_name = "fc"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.weight.mul_(2)
    with pytest.warns(UserWarning, match="written into Sparse24Linear 'fc' is not 2:4.*the larger two of every four"):
        layer.weight.copy_(3 * linear.weight)
    assert torch.equal(layer.weight, 3 * linear.weight * sparse24.best_mask(linear.weight.abs()))


# ---- training
def test_the_weight_of_a_float_convolution_has_gradients() -> None:
    layer = made("conv-float")
    x, target = torch.randn(2, 6, 7, 5), torch.randn(2, 9, 7, 5)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return (F.conv2d(x, weight, layer.bias, padding=1) - target).square().mean()

    weight = layer.weight.detach().clone().requires_grad_()
    loss(weight).backward()
    loss(layer.weight).backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(layer.weight_ohwi.grad, weight.grad.permute(0, 2, 3, 1))
    layer.weight.grad = None
    assert layer.weight_ohwi.grad is None
    layer.weight.requires_grad = False
    assert not layer.weight_ohwi.requires_grad and not layer.weight.requires_grad
    view = layer.weight.requires_grad_()[0]
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="has changed since it was read"):
        view.sum()


def test_gradients_flow_past_a_quantised_weight() -> None:
    layer, x = made("int8"), torch.randn(3, K, requires_grad=True)
    F.linear(x, layer.weight).sum().backward()
    torch.testing.assert_close(x.grad, plain_weight(layer).sum(0).expand(3, K))
    assert {name for name, _ in layer.named_parameters()} == {"bias"}


def test_under_transformations_it_is_a_constant() -> None:
    layer, x = made("int8"), torch.randn(4, K)
    weight, expected = layer.weight, plain_weight(layer)
    torch.testing.assert_close(torch.func.vmap(lambda row: weight @ row)(x), x @ expected.t())
    torch.testing.assert_close(torch.func.grad(lambda row: F.linear(row, layer.weight).sum())(x[0]), expected.sum(0))
    torch.testing.assert_close(torch.func.jacrev(lambda row: layer.weight[1:] @ row)(x[0]), expected[1:])
    torch.testing.assert_close(torch.func.vmap(torch.sum)(weight), expected.sum(1))
    assert torch.equal(layer.weight, expected)


# ---- the module around it
@torch.no_grad()
def test_two_layers_may_share_one_weight() -> None:
    """As ``a.weight = b.weight`` of plain layers ties them."""
    for name in ("int4", "conv-float", "sparse24-int8"):
        a, b = made(name), made(name)
        b.weight.mul_(4)
        a.weight = b.weight
        b.weight.mul_(0.5)
        assert torch.equal(a.weight, b.weight)
        assert [id(tensor) for tensor in a._held_weight().values()] == [*map(id, b._held_weight().values())]
    smooth, other = made("int8-smooth-no_bias"), made("int8-smooth-no_bias")
    other.channel_scale.mul_(2)
    other.weight.mul_(0.5)
    before = plain_weight(other).clone()
    smooth.weight = other.weight
    assert_stores(smooth, before)
    assert smooth.weight_codes is not other.weight_codes, "their channel scales differ"


def test_a_layer_made_in_inference_mode_is_written_to_anywhere() -> None:
    with torch.inference_mode():
        layer, x = made("int8"), torch.randn(3, K)
        before = layer(x)
    weight = plain_weight(layer).clone()
    with torch.no_grad():
        layer.weight.mul_(2)
        torch.testing.assert_close(layer.weight.clone(), 2 * weight)
    with torch.inference_mode():
        layer.bias.data.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("each", CONVOLUTIONS, ids=[each.name for each in CONVOLUTIONS])
def test_the_bias_of_a_convolution_has_the_dtype_of_the_layer(each: Any, dtype: torch.dtype) -> None:
    """To those who read it: F.conv1d wants that."""
    layer = each.make(dtype)
    if layer.bias is None:
        assert layer.config()["bias"] is False
        return
    stored, x = layer._parameters["bias"], each.input().to(dtype)
    assert stored.dtype == torch.float32 and layer.bias.dtype == dtype
    function = F.conv1d if layer.origin == "Conv1d" else F.conv2d
    assert function(x, layer.weight, layer.bias, groups=layer.groups).dtype == dtype
    before = stored.detach().clone()
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        layer.bias.mul_(2)
        layer.bias.data += 1
        layer.bias += 1
        layer.bias[0] = 3
        assert_computes_what_it_stores(layer, x)
    assert layer._parameters["bias"] is stored
    torch.testing.assert_close(stored[1:].detach(), (2 * before + 2)[1:], rtol=2e-2, atol=2e-2)
    layer.bias = nn.Parameter(before.to(dtype))
    assert layer._parameters["bias"].dtype == torch.float32
    torch.testing.assert_close(layer.bias.detach().clone(), before.to(dtype))
    assert "bias" in dict(layer.named_parameters()) and torch.export.export(layer, (x,)).module()(x).dtype == dtype
