"""What quantised modules are made of: construction, attributes, conversion from and to float."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from tests.contracts.layers import K, Layer, N, each_layer
from tilewright.convert import load_model, save_model
from tilewright.kernels.formats import int4, int8
from tilewright.kernels.formats.int8 import Int8
from tilewright.kernels.formats.weight import Spec
from tilewright.nn import (
    Int4Linear,
    Int8ActInt4WeightLinear,
    Int8Linear,
    Int8WeightOnlyLinear,
    Sparse24Linear,
    kinds,
)
from tilewright.nn.quantized_linear import QuantizedLinear, dtype_name, parse_dtype
from tilewright.nn.weight_holder import stored_name


@each_layer
def test_attributes_are_those_of_the_linear_layer(layer: Layer) -> None:
    linear = layer.linear()
    module = layer.quantize(linear)
    assert (module.in_features, module.out_features) == (linear.in_features, linear.out_features)
    assert module.bias is linear.bias, "the bias is shared, not copied"
    assert module.weight.shape == linear.weight.shape
    assert (module.dtype, module.device) == (torch.float32, torch.device("cpu"))
    assert module.weight_bytes() == sum(b.numel() * b.element_size() for b in module.buffers())
    assert module.weight_bytes() < linear.weight.numel() * (2.2 if layer.name == "sparse24-float32" else 4 / 3)
    assert isinstance(module.scheme_name, str)


@each_layer
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_training_mode_is_kept(layer: Layer, training: bool) -> None:
    module = layer.quantize(layer.linear().train(training))
    assert module.training == training
    assert module.to_float().training == training
    assert module.eval().training is False


@each_layer
def test_extra_repr_says_what_matters(layer: Layer) -> None:
    text = repr(layer.make(activation="silu"))
    assert text.startswith(f"{layer.cls.__name__}(in_features={K}, out_features={N}, bias={layer.bias}")
    assert "activation=silu" in text
    if "int4" in layer.name:
        assert "group_size=" in text and "symmetric=" in text


@each_layer
def test_to_float_and_back(layer: Layer) -> None:
    linear = layer.linear()
    module = layer.quantize(linear)
    back = module.to_float()
    assert type(back) is nn.Linear
    assert back.bias is linear.bias
    assert isinstance(back.weight, nn.Parameter) and back.weight.dtype == torch.float32
    assert torch.equal(back.weight, module.dequantize_weight())
    assert (back.in_features, back.out_features) == (K, N)
    relative = ((back.weight - linear.weight).norm() / linear.weight.norm()).item()
    assert relative < (0.15 if "int4" in layer.name else 0.01)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_to_float_has_the_dtype_of_the_original(layer: Layer, dtype: torch.dtype) -> None:
    module = layer.make(dtype=dtype)
    assert module.to_float().weight.dtype == dtype
    assert module.config()["dtype"] == dtype_name(dtype)


@each_layer
def test_a_fused_activation_cannot_go_back(layer: Layer) -> None:
    with pytest.raises(ValueError, match="ends in relu, which nn.Linear cannot"):
        layer.make(activation="relu").to_float()


def test_the_float_layer_is_left_as_it_was() -> None:
    linear = nn.Linear(K, N)
    before = linear.weight.detach().clone()
    Int8Linear.from_float(linear, channel_scale=torch.rand(K) + 0.5)
    assert torch.equal(linear.weight, before)


def test_the_weight_is_what_the_format_says() -> None:
    linear = nn.Linear(K, N)
    for cls in (Int8Linear, Int8WeightOnlyLinear):
        module = cls.from_float(linear, range_search="mse")
        assert all(map(torch.equal, (module.weight_codes, module.weight_scale), int8.quantize(linear.weight, "mse")))
    for cls in (Int4Linear, Int8ActInt4WeightLinear):
        module = cls.from_float(linear, group_size=32, symmetric=False, scale_dtype="float32")
        expected = int4.quantize(linear.weight, 32, False, "mse")
        assert all(map(torch.equal, (module.weight_packed, module.weight_scale, module.weight_zero), expected))


def test_the_channel_scale_moves_from_weight_to_input() -> None:
    linear, channel_scale = nn.Linear(K, N), torch.rand(K) + 0.5
    module = Int8Linear.from_float(linear, channel_scale=channel_scale)
    q, scale = int8.quantize(linear.weight / channel_scale)
    assert torch.equal(module.weight_codes, q) and torch.equal(module.weight_scale, scale)
    assert torch.equal(module.dequantize_weight(), int8.dequantize(q, scale) * channel_scale)


@pytest.mark.parametrize("cls", [Int4Linear, Int8WeightOnlyLinear])
def test_float32_layers_multiply_in_bfloat16_and_others_in_their_own_dtype(cls: type) -> None:
    assert cls.from_float(nn.Linear(K, N)).compute_dtype == torch.bfloat16
    assert cls.from_float(nn.Linear(K, N).half()).compute_dtype is None
    assert cls.from_float(nn.Linear(K, N), compute_dtype=None).compute_dtype is None
    assert cls.from_float(nn.Linear(K, N), compute_dtype="float16").compute_dtype == torch.float16


def test_int4_scales_have_16_bits_by_default() -> None:
    for dtype, expected in (
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ):
        assert Int4Linear.from_float(nn.Linear(K, N, dtype=dtype)).weight_scale.dtype == expected


@each_layer
def test_bad_options(layer: Layer) -> None:
    with pytest.raises(TypeError, match="takes an nn.Linear, not Conv2d"):
        layer.quantize(nn.Conv2d(1, 1, 1)) if not layer.smooth else layer.cls.from_float(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="activation 'swish' is unknown"):
        layer.make(activation="swish")
    if layer.cls is not Sparse24Linear:  # which rounds nothing
        with pytest.raises(ValueError, match="range search 'best' is unknown"):
            layer.make(range_search="best")
    linear = layer.linear()
    with torch.no_grad():
        linear.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        layer.quantize(linear)


def test_bad_channel_scale_and_group_size_and_dtype() -> None:
    for cls in (Int8Linear, Int8ActInt4WeightLinear):
        with pytest.raises(ValueError, match=rf"{cls.__name__}: channel_scale must have shape \[{K}\]"):
            cls.from_float(nn.Linear(K, N), channel_scale=torch.ones(K + 1))
    with pytest.raises(ValueError, match="group_size must be positive"):
        Int4Linear.from_float(nn.Linear(K, N), group_size=0)
    with pytest.raises(ValueError, match="'int8' is not the name of a float dtype"):
        Int4Linear.from_float(nn.Linear(K, N), compute_dtype="int8")
    with pytest.raises(ValueError, match="'floaty' is not the name"):
        parse_dtype("floaty")


def test_the_base_class_says_what_is_missing() -> None:
    base = QuantizedLinear(4, 4)
    with pytest.raises(NotImplementedError, match="QuantizedLinear.base_format"):
        base.dequantize_weight()


@each_layer
def test_unknown_options_are_named(layer: Layer) -> None:
    with pytest.raises(
        TypeError, match=rf"{layer.cls.__name__}.from_float\(\) got an unexpected keyword argument 'odd'"
    ):
        layer.make(odd=1)
    with pytest.raises(TypeError, match=rf"{layer.cls.__name__}.__init__\(\) got an unexpected keyword argument 'odd'"):
        layer.cls(K, N, odd=1)


@each_layer
def test_from_float_shows_its_options(layer: Layer) -> None:
    parameters = inspect.signature(layer.cls.from_float).parameters
    assert next(iter(parameters)) == "linear" and parameters["activation"].default == "none"
    given = {*layer.options, *(["channel_scale"] if layer.smooth else [])}
    known = {name for name, each in parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY}
    assert given <= known
    assert ("mask" in known) == layer.name.startswith("sparse24")


@each_layer
def test_the_format_says_what_is_stored(layer: Layer) -> None:
    module = layer.make()
    stored = {name: Spec(tuple(t.shape), t.dtype) for name, t in module.named_buffers() if name.startswith("weight")}
    assert {stored_name(name): spec for name, spec in module.weight_format.operands(N, K).items()} == stored
    assert module.weight_format.options(K).items() <= module.config().items()
    assert set(module.weight_format.facts(K)) <= {*module.config()}


def test_a_new_kind_of_layer_is_a_declaration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator, a format and the options: what a plugin writes. Checkpoints then know it."""
    monkeypatch.setattr(kinds, "_KINDS", kinds.registered_kinds())

    class Int8Twin(QuantizedLinear):
        scheme_name = "twin"
        op_name = "int8_weight_only_linear"
        base_format = Int8()
        options: ClassVar[dict[str, Any]] = {"compute_dtype": None}

    linear, x = nn.Linear(K, N), torch.randn(3, K)
    twin = Int8Twin.from_float(linear)
    expected = Int8WeightOnlyLinear.from_float(linear, compute_dtype=None)(x)
    for _ in range(4):
        assert torch.equal(twin(x), expected)
    save_model(nn.Sequential(twin), tmp_path / "model")
    again = load_model(tmp_path / "model", lambda: nn.Sequential(nn.Linear(K, N)))
    assert type(again[0]) is Int8Twin
    assert torch.equal(again(x), expected)


def test_a_class_does_not_pass_for_another_of_its_name(tmp_path: Path) -> None:
    other = type("Int8Linear", (Int8Linear,), {"__module__": "elsewhere"})
    assert kinds.registered_kinds()["Int8Linear"] is Int8Linear
    with pytest.raises(ValueError, match="'0' is a Int8Linear, which load_model does not know"):
        save_model(nn.Sequential(other.from_float(nn.Linear(K, N))), tmp_path / "model")


def test_a_class_that_is_defined_anew_replaces_the_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a cell of a notebook runs again."""
    monkeypatch.setattr(kinds, "_KINDS", kinds.registered_kinds())
    first, second = (type("Odd", (Int8Linear,), {"__module__": "notebook"}) for _ in range(2))
    assert first is not second
    assert kinds.registered_kinds()["Odd"] is second
