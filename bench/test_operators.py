"""Microbenchmarks of every quantised layer for pytest-benchmark, small enough for any CPU: ``make bench``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tilewright.nn as tnn

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
