"""What a fused convolution promises: the same as the quantised linear layers, and the attributes of ``nn.Conv2d``."""

from __future__ import annotations

import copy
import json
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tests.contracts.convolutions import CHANNELS, OUT, Convolution, each_convolution
from tests.tolerance import assert_close_as_plain
from tilewright.kernels.dispatch.router import record_problems
from tilewright.nn import ConvLayer, Int8ConvBnAct2d

KEPT = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    *("transposed", "output_padding"),
)


def same(a: ConvLayer, b: ConvLayer, x: torch.Tensor) -> None:
    """Two modules hold the same bits and compute the same."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name
    assert torch.equal(a(x), b(x))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def run_plain(conv: nn.Module, norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    return conv(x) if norm is None else norm(conv(x))


# ---- forward
@each_convolution
@torch.no_grad()
def test_output_is_that_of_the_plain_layers(convolution: Convolution) -> None:
    conv, norm = convolution.plain()
    x = convolution.input()
    y, plain = convolution.fuse(conv, norm)(x), run_plain(conv, norm, x)
    exact = run_plain(copy.deepcopy(conv).double(), copy.deepcopy(norm).double() if norm else None, x.double())
    if convolution.is_int8:
        # Noise of 8 bits in weights and activations, which cover 3 standard deviations.
        assert relative_error(y, exact) < 0.03
    else:
        assert_close_as_plain(y, plain, exact)


@each_convolution
def test_the_attributes_of_the_plain_layer_are_kept(convolution: Convolution) -> None:
    conv, norm = convolution.plain()
    module = convolution.fuse(conv, norm)
    assert {name: getattr(module, name) for name in KEPT} == {name: getattr(conv, name) for name in KEPT}
    assert repr(conv).split("(", 1)[1].split(")")[0] in repr(module)
    assert module.training == conv.training


@each_convolution
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_the_output_has_the_dtype_of_the_input(convolution: Convolution, dtype: torch.dtype) -> None:
    y = convolution.make(dtype)(convolution.input().to(dtype))
    assert y.dtype == dtype


@each_convolution
@torch.no_grad()
def test_strides_batches_and_missing_batches(convolution: Convolution) -> None:
    module, x = convolution.make(), convolution.input(4)
    flat = module(x)
    assert flat.is_contiguous()
    assert torch.equal(module(x.transpose(0, 1).contiguous().transpose(0, 1)), flat)
    assert torch.equal(module(torch.cat([x, x], -1)[..., : x.shape[-1]]), flat)
    assert torch.equal(module(x[:1].expand(4, *x.shape[1:])), module(x[:1]).expand_as(flat))
    assert torch.equal(module(x[1]), flat[1])
    assert module(x[:0]).shape == (0, *flat.shape[1:])
    if convolution.dims == 2:
        last = module(x.contiguous(memory_format=torch.channels_last))
        assert torch.equal(last, flat)
        assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(1, 1), (1, 9)], ids=["one_pixel", "one_row"])
@torch.no_grad()
def test_smallest_layers(size: tuple[int, int]) -> None:
    conv = nn.Conv2d(1, 1, 1)
    for module in (Convolution("", kind, {}, o, False).fuse(conv, None) for kind, o in _kinds()):
        x = torch.randn(1, 1, *size).clamp(-3, 3)
        torch.testing.assert_close(module(x), conv(x), rtol=0.02, atol=0.05)


def _kinds() -> list[tuple[type[ConvLayer], dict[str, Any]]]:
    from tilewright.nn import ConvBnAct2d

    return [(ConvBnAct2d, {}), (Int8ConvBnAct2d, {"input_scale": 3 / 127})]


@each_convolution
@torch.no_grad()
def test_an_image_does_not_depend_on_the_others(convolution: Convolution) -> None:
    module, x = convolution.make(), convolution.input(3)
    clean = module(x)
    x[1] = 1e30
    assert torch.equal(module(x)[[0, 2]], clean[[0, 2]])


@each_convolution
@torch.no_grad()
def test_runs_repeat_to_the_bit_in_any_mode_and_thread(convolution: Convolution) -> None:
    module, x = convolution.make().eval(), convolution.input()
    first = module(x)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(module(x), first)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, first) for y in pool.map(lambda _: module(x).detach(), range(12)))


@each_convolution
@pytest.mark.parametrize(
    "activation", ["relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh", "leaky_relu"], ids=str
)
@torch.no_grad()
def test_residual_and_activation(convolution: Convolution, activation: str) -> None:
    conv, norm = convolution.plain()
    x = convolution.input()
    apply: dict[str, Any] = {
        "relu": F.relu,
        "relu6": F.relu6,
        "hardswish": F.hardswish,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "leaky_relu": lambda y: F.leaky_relu(y, 0.2),
    }
    linear = convolution.fuse(conv, norm)
    fused = convolution.fuse(conv, norm, activation=activation, negative_slope=0.2)
    residual = torch.randn_like(linear(x))
    expected = apply[activation](linear(x) + residual)
    torch.testing.assert_close(fused(x, residual), expected, rtol=1e-5, atol=1e-5)
    broadcast = residual[..., :1]
    torch.testing.assert_close(fused(x, broadcast), apply[activation](linear(x) + broadcast), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zeros", [(None, None, None), (-127, 40, -90)], ids=["symmetric", "zero points"])
@torch.no_grad()
def test_int8_in_and_out(zeros: tuple[int | None, ...]) -> None:
    """The integers that a float call would round to, step by step."""
    names = ("input", "residual", "output")
    scales = {"input_scale": 0.03, "residual_scale": 0.02, "output_scale": 0.05}
    given = {f"{name}_zero_point": zero for name, zero in zip(names, zeros, strict=True)}
    convolution = Convolution("", Int8ConvBnAct2d, {"padding": 1}, {**scales, **given})
    conv, norm = convolution.plain()
    module = convolution.fuse(conv, norm, activation="relu")
    unfused = convolution.fuse(conv, norm, activation="relu", output_scale=None, output_zero_point=None)
    q = torch.randint(-127, 128, (2, CHANNELS, 7, 5), dtype=torch.int8)
    r = torch.randint(-127, 128, (2, OUT, 7, 5), dtype=torch.int8)
    y = module(q, r)
    assert y.dtype == torch.int8
    zx, zr, zy = (zero or 0 for zero in zeros)
    x, added = (q.float() - zx) * torch.tensor(0.03), (r.float() - zr) * torch.tensor(0.02)
    expected = ((unfused(x, added) / 0.05).round() + zy).clamp(-127, 127)
    assert (y - expected).abs().max() <= 1
    assert (y != expected).float().mean() < 0.01  # ties, which the rounding of r * 0.02 decides
    assert torch.equal(y, module(x, r))
    broadcast = module(q, r[:1])
    assert torch.equal(broadcast[0], y[0]) and not torch.equal(broadcast[1], y[1])


@each_convolution
@torch.no_grad()
def test_hooks(convolution: Convolution) -> None:
    module, x = convolution.make(), convolution.input()
    plain, doubled = module(x), module(x * 2)
    calls: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _, given: calls.append("before") or (given[0] * 2,)),
        module.register_forward_hook(lambda _, given, y: calls.append("after") or y + 1),
    ]
    assert torch.equal(module(x), doubled + 1)
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    assert torch.equal(module(x), plain)


@each_convolution
def test_compiles_in_one_graph(convolution: Convolution) -> None:
    torch._dynamo.reset()
    module = convolution.make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3):
            x = convolution.input(batch)
            assert torch.equal(compiled(x), module(x))


@each_convolution
@torch.no_grad()
def test_the_problem_is_the_one_that_forward_poses(convolution: Convolution) -> None:
    """So that the report names the implementation that runs."""
    module = convolution.make()
    size = 13
    with record_problems() as asked:
        module(torch.randn(2, CHANNELS, *([size] * convolution.dims)))
    (problem,) = [problem for problem in asked if problem.op == module.op_name]
    required = module.problem(2, problem.x_dtype, size)
    for name in ("op", "m", "n", "k", "x_dtype", "conv", "bias", "activation"):
        assert getattr(required, name) == getattr(problem, name), name


def test_a_fused_convolution_trains() -> None:
    conv, norm = Convolution("", Int8ConvBnAct2d, {"padding": 1}).plain()
    from tilewright.nn import ConvBnAct2d

    module, twin = ConvBnAct2d.from_float(conv, norm), copy.deepcopy(conv)
    x = torch.randn(2, CHANNELS, 7, 5)
    module(x).square().mean().backward()
    assert module.weight.grad is not None and module.bias is not None and module.bias.grad is not None
    with torch.no_grad():
        module.bias.add_(1)
        module.weight.add_(1)
    assert torch.equal(conv.weight, twin.weight) and torch.equal(conv.bias, twin.bias), "the original was changed"


# ---- state
@each_convolution
@torch.no_grad()
def test_the_state_dict_holds_plain_canonical_tensors(convolution: Convolution) -> None:
    module = convolution.make(torch.float16)
    state = module.state_dict()
    groups = convolution.conv.get("groups", 1)
    kernel = convolution.conv.get("kernel_size", 3)
    shape = (OUT, kernel if convolution.dims == 2 else 1, kernel, CHANNELS // groups)
    if convolution.is_sparse:
        rows, groups_of_four = math.prod(shape[:3]), -(-shape[3] // 4)
        assert state["weight_values"].shape == (rows, 2 * groups_of_four)
        assert state["weight_meta"].shape == (rows, -(-groups_of_four // 2))
        assert (state["weight_values"].dtype, state["weight_meta"].dtype) == (torch.float16, torch.uint8)
    else:
        name = "weight_codes" if convolution.is_int8 else "weight_ohwi"
        assert state[name].shape == shape
        assert state[name].dtype == (torch.int8 if convolution.is_int8 else torch.float16)
    assert ("bias" in state) == (convolution.norm or convolution.conv.get("bias", True))
    weights = {"weight_values", "weight_meta"} if convolution.is_sparse else {name}
    expected = {*weights, *(["bias"] if "bias" in state else [])}
    if convolution.is_int8:
        expected |= {"weight_scale", "input_scale"}
        grids = ("residual_scale", "output_scale", "input_zero_point", "residual_zero_point", "output_zero_point")
        expected |= {name for name in grids if name in convolution.options}
    assert state.keys() == expected
    for name, value in state.items():
        assert type(value) is torch.Tensor and value.is_contiguous()
        assert name in weights or value.dtype == (torch.int32 if name.endswith("_zero_point") else torch.float32)
    module(convolution.input().half())
    assert module.state_dict().keys() == state.keys(), "a forward added to the state"


@each_convolution
@torch.no_grad()
def test_safetensors_round_trip(convolution: Convolution, tmp_path: Path) -> None:
    module, other = convolution.make(), convolution.make()
    save_file(module.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
    same(module, other, convolution.input())


@each_convolution
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@torch.no_grad()
def test_loading_into_a_module_that_has_run(convolution: Convolution, assign: bool) -> None:
    more = {"input_scale": 0.05} if convolution.is_int8 else {}
    module, other, x = convolution.make(**more), convolution.make(), convolution.input()
    before = other(x)
    other.load_state_dict(module.state_dict(), strict=True, assign=assign)
    assert not torch.equal(other(x), before)
    same(module, other, x)


@each_convolution
@torch.no_grad()
def test_built_on_the_meta_device_and_filled(convolution: Convolution) -> None:
    module = convolution.make()
    empty = type(module)(**json.loads(json.dumps(module.config())), device="meta")
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    assert empty(convolution.input().to("meta")).shape == module(convolution.input()).shape
    empty.load_state_dict(module.state_dict(), strict=True, assign=True)
    same(module, empty, convolution.input())
    assert empty.config() == module.config()


@each_convolution
@torch.no_grad()
def test_copies(convolution: Convolution) -> None:
    module, x = convolution.make(), convolution.input()
    module(x)
    same(module, copy.deepcopy(module), x)
    same(module, pickle.loads(pickle.dumps(module)), x)  # noqa: S301 (what this test has just pickled)


@each_convolution
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_casting_leaves_scales_and_bias_as_they_are(convolution: Convolution, dtype: torch.dtype) -> None:
    module = convolution.make()
    kept = {name: value.clone() for name, value in module.state_dict().items() if name != "weight_ohwi"}
    assert module.to(dtype) is module
    state = module.state_dict()
    assert all(torch.equal(state[name], value) and state[name].dtype == value.dtype for name, value in kept.items())
    assert module.dtype == dtype
    assert module(convolution.input().to(dtype)).dtype == dtype
    assert module.to_float().weight.dtype == dtype


@each_convolution
@torch.no_grad()
def test_to_float_gives_the_plain_layer_back(convolution: Convolution) -> None:
    conv, norm = convolution.plain()
    module, x = convolution.fuse(conv, norm), convolution.input()
    plain = module.to_float()
    assert type(plain) is type(conv)
    assert {name: getattr(plain, name) for name in KEPT} == {name: getattr(conv, name) for name in KEPT}
    assert relative_error(plain(x), run_plain(conv, norm, x)) < (0.02 if convolution.is_int8 else 1e-6)
    with pytest.raises(ValueError, match="ends in relu, which nn.Conv.d cannot"):
        convolution.fuse(conv, norm, activation="relu").to_float()


@each_convolution
def test_a_state_dict_of_another_kind_is_refused(convolution: Convolution) -> None:
    module = convolution.make()
    for name in module.state_dict():
        short = {key: value for key, value in module.state_dict().items() if key != name}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            convolution.make().load_state_dict(short)
        if name == "bias" or convolution.is_int8:
            bad = {**module.state_dict(), name: module.state_dict()[name].half()}
            for assign in (False, True):
                with pytest.raises(RuntimeError, match=f"{name} must be torch.*not torch.float16"):
                    convolution.make().load_state_dict(bad, assign=assign)
    with pytest.raises(RuntimeError):
        module.load_state_dict(convolution.plain()[0].state_dict())


# ---- bad input
@each_convolution
@pytest.mark.parametrize("label", ["", "layer4.0.conv1"], ids=["unnamed", "named"])
def test_errors_name_the_layer(convolution: Convolution, label: str) -> None:
    module, x = convolution.make(), convolution.input()
    module.layer_name = label
    words = type(module).__name__ + (f" '{label}'" if label else "")
    with pytest.raises(ValueError, match=rf"{words} takes input .* with {CHANNELS} channels, not input of shape"):
        module(torch.cat([x, x], 1))
    with pytest.raises(ValueError, match=f"{words} takes input"):
        module(torch.tensor(1.0))
    with pytest.raises(TypeError, match=f"{words} takes float input, not torch.int64"):
        module(x.long())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be an int or 2 of them"),
        ({"padding": "reflect"}, "padding must be integers or one of same, valid"),
        ({"padding": "same", "stride": 2}, "not defined for strided"),
        ({"groups": 4}, "in_channels must be a positive multiple of groups=4, not 6"),
        ({"activation": "tanh"}, "activation 'tanh' is unknown"),
        ({"origin": "Conv3d"}, "origin must be"),
    ],
    ids=["kernel", "padding", "same", "groups", "activation", "origin"],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    for kind, _ in _kinds():
        with pytest.raises(ValueError, match=message):
            kind(**{"in_channels": 6, "out_channels": 8, "kernel_size": 3, **options})


def test_from_float_refuses_what_it_cannot_be_true_to() -> None:
    from tilewright.nn import ConvBnAct2d

    with pytest.raises(TypeError, match=r"takes an nn.Conv2d or nn.Conv1d, not Linear"):
        ConvBnAct2d.from_float(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        ConvBnAct2d.from_float(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="normalises by the batch"):
        ConvBnAct2d.from_float(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2, track_running_stats=False).eval())
    with pytest.raises(ValueError, match="has 3 channels, the convolution 2"):
        ConvBnAct2d.from_float(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(3).eval())
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="input_scale must be positive and finite"):
            Int8ConvBnAct2d.from_float(nn.Conv2d(2, 2, 3), input_scale=bad)
    for wrong in ({"input_zero_point": 128}, {"input_zero_point": -128}, {"output_zero_point": 3}):
        with pytest.raises(ValueError, match="_zero_point must lie in -127 to 127, and have a scale"):
            Int8ConvBnAct2d.from_float(nn.Conv2d(2, 2, 3), input_scale=1.0, **wrong)
