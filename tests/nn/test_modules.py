"""What quantised modules are made of: construction, attributes, conversion from and to float."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.contracts.layers import K, Layer, N, each_layer
from tilewright.kernels.formats import int4, int8
from tilewright.nn import Int4Linear, Int8ActInt4WeightLinear, Int8Linear, Int8WeightOnlyLinear, Sparse24Linear
from tilewright.nn.quantized_linear import QuantizedLinear, dtype_name, parse_dtype


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
        assert all(map(torch.equal, (module.weight, module.weight_scale), int8.quantize(linear.weight, "mse")))
    for cls in (Int4Linear, Int8ActInt4WeightLinear):
        module = cls.from_float(linear, group_size=32, symmetric=False, scale_dtype="float32")
        expected = int4.quantize(linear.weight, 32, False, "mse")
        assert all(map(torch.equal, (module.weight_packed, module.weight_scale, module.weight_zero), expected))


def test_the_channel_scale_moves_from_weight_to_input() -> None:
    linear, channel_scale = nn.Linear(K, N), torch.rand(K) + 0.5
    module = Int8Linear.from_float(linear, channel_scale=channel_scale)
    q, scale = int8.quantize(linear.weight / channel_scale)
    assert torch.equal(module.weight, q) and torch.equal(module.weight_scale, scale)
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
    with pytest.raises(NotImplementedError, match="QuantizedLinear.dequantize_weight"):
        base.dequantize_weight()
