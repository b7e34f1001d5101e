"""Microbenchmarks of every quantised layer and operator, small enough for any CPU: ``make bench``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright.nn as tnn
from bench.problems import SPARSE, Shape
from bench.problems import make_arguments as bench_arguments
from tilewright.kernels.conv_geometry import ConvGeometry
from tilewright.kernels.conv_ops import CONV_OPERATORS
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.ops import OPERATORS
from tilewright.kernels.samples import CONVOLUTIONS, make_arguments

LAYERS = {
    "fp32": lambda linear: linear,
    "int8": tnn.Int8Linear.from_float,
    "int8-weight-only": tnn.Int8WeightOnlyLinear.from_float,
    "int4": lambda linear: tnn.Int4Linear.from_float(linear, range_search="minmax"),
    "int8-activation-int4-weight": lambda linear: tnn.Int8ActInt4WeightLinear.from_float(linear, range_search="minmax"),
}


@pytest.mark.parametrize("m", [1, 16, 128])
@pytest.mark.parametrize("name", LAYERS)
def test_linear(benchmark, name: str, m: int) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name](nn.Linear(1024, 1024))
    x = torch.randn(m, 1024)
    benchmark.group = f"1024 x 1024, M = {m}"
    with torch.inference_mode():
        y = benchmark(layer, x)
    assert torch.isfinite(y).all() and y.shape == (m, 1024)


@pytest.mark.parametrize("op", ["quantize_per_row", "rms_norm_quantize", "layer_norm_quantize"])
def test_quantizers(benchmark, op: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 1024)
    benchmark.group = "128 x 1024"
    q, scale = benchmark(getattr(torch.ops.tilewright, op), x)
    assert q.shape == x.shape and torch.isfinite(scale).all()


def _arguments(op: str) -> dict[str, Any]:
    """A problem of 1024 x 1024 at 16 rows, or a 3 x 3 convolution of 64 channels on 28 x 28 pixels."""
    if op in SPARSE:
        return bench_arguments(op, Shape(16, 1024, 1024, torch.float32, group_size=128))
    if op == "sparse24_conv2d_fused":
        layer = tnn.Sparse24ConvBnAct2d.from_float(nn.Conv2d(64, 64, 3, padding=1))
        weight = {"weight_values": layer.weight_values, "weight_meta": layer.weight_meta, "kernel_size": [3, 3]}
        return {"x": torch.randn(1, 64, 28, 28), **weight, "bias": layer.bias, "padding": [1, 1, 1, 1]}
    if op in CONVOLUTIONS:
        sizes = ConvGeometry(1, 64, 28, 28, 64, (3, 3), padding=(1, 1, 1, 1))
        dtype = torch.int8 if op.startswith("int8") else torch.float32
        return make_arguments(Problem(op, 784, 64, 576, dtype, conv=sizes, bias=True, activation="relu"))
    group = 128 if op.startswith("int4") else None
    return make_arguments(Problem(op, 16, 1024, 1024, torch.float32, bias=True, group_size=group))


@pytest.mark.parametrize("op", [*OPERATORS, *CONV_OPERATORS])
def test_operator(benchmark, op: str) -> None:
    torch.manual_seed(0)
    arguments = _arguments(op)
    benchmark.group = "operators"
    with torch.inference_mode():
        result = benchmark(getattr(torch.ops.tilewright, op), **arguments)
    assert torch.isfinite((result[0] if isinstance(result, tuple) else result).float()).all()


@pytest.mark.parametrize("name", ["PyTorch", "tilewright"])
def test_attention(benchmark, name: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 32, 22, 12, 32).transpose(2, 3).unbind()
    function = torch.ops.tilewright.attention if name == "tilewright" else F.scaled_dot_product_attention
    benchmark.group = "attention, 32 x 12 heads, 22 x 32"
    with torch.inference_mode():
        y = benchmark(function, q, k, v)
    assert torch.isfinite(y).all() and y.shape == q.shape
