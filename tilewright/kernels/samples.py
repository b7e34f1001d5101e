"""Random arguments for any operator, made from a ``Problem``: what is tuned, checked and timed without a model.

Sums are of order 1, as in a model whose activations are normalised.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats import int4

QUANTIZERS = ("quantize_per_row", "rms_norm_quantize", "layer_norm_quantize")
CONVOLUTIONS = ("conv2d_fused", "int8_conv2d_fused")


class _Draw:
    """Random tensors of one generator. None: the device is "meta", and nothing is drawn."""

    def __init__(self, device: str | torch.device, generator: torch.Generator | None) -> None:
        self.options: dict[str, Any] = {"device": device, "generator": generator}

    def normal(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*size, **self.options).to(dtype)

    def positive(self, *size: int) -> torch.Tensor:
        return torch.rand(*size, **self.options) + 0.5

    def integers(self, low: int, high: int, *size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, size, dtype=dtype, **self.options)


def make_arguments(problem: Problem, device: str | torch.device = "cpu", seed: int = 0) -> dict[str, Any]:
    """Arguments of ``problem.op`` by name, drawn from ``seed`` on ``device``; "meta" gives tensors without memory.

    x [m, k] of ``problem.x_dtype``; scales and bias in ``problem.scale_dtype`` where the operator lets them choose.
    ``problem.aligned`` false: the rows of x begin where no 16-byte load can. Raises ValueError for an operator that is
    not known here.
    """
    kind = torch.device(device)
    generator = None if kind.type == "meta" else torch.Generator(kind).manual_seed(seed)
    draw = _Draw(kind, generator)
    if problem.op in CONVOLUTIONS:
        return _convolution(problem, draw)
    arguments = _linear(problem, draw)
    if not problem.aligned:
        x = arguments["x"]
        wide = x.new_empty(len(x), problem.k + 1)
        arguments["x"] = wide[:, 1:].copy_(x)
    return arguments


def _linear(problem: Problem, draw: _Draw) -> dict[str, Any]:
    op, m, n, k = problem.op, problem.m, problem.n, problem.k
    dtype = problem.out_dtype or (torch.bfloat16 if problem.x_dtype == torch.int8 else problem.x_dtype)
    if op in QUANTIZERS:
        x = draw.normal(m, k, dtype=problem.x_dtype)
        if op == "quantize_per_row":
            return {"x": x, "channel_scale": draw.positive(k) if problem.bias else None}
        affine = {"weight": draw.normal(k, dtype=dtype), "bias": draw.normal(k, dtype=dtype)}
        return {"x": x, **{name: affine[name] for name in affine if name == "weight" or op == "layer_norm_quantize"}}
    if op == "quantize_per_tensor":
        return {"x": draw.normal(m, k, dtype=problem.x_dtype), "scale": 1 / 40}
    end = {
        "bias": draw.normal(n, dtype=dtype) if problem.bias else None,
        "residual": draw.normal(m, n, dtype=dtype) if problem.residual else None,
        "activation": problem.activation,
    }
    spread = max(k, 1) ** -0.5
    if op == "int8_linear_quantized":
        x = draw.integers(-127, 128, m, k, dtype=torch.int8)
    else:
        x = draw.normal(m, k, dtype=problem.x_dtype)
    if op in ("int4_linear", "int4_int8_linear"):
        group_size = problem.group_size or max(k, 1)
        groups = int4.group_count(k, group_size)
        zero = None
        if not problem.symmetric:
            zero = draw.integers(-(2**31), 2**31, -(-n // 8), groups, dtype=torch.int32)
        weight = {
            "weight_packed": draw.integers(-(2**31), 2**31, n, -(-k // 8), dtype=torch.int32),
            "weight_scale": (draw.positive(n, groups) * (spread / 5)).to(problem.scale_dtype),
            "weight_zero": zero,
            "group_size": group_size,
        }
        if op == "int4_linear":
            weight["compute_dtype"] = problem.compute_dtype
        return {"x": x, **weight, **end}
    if op not in ("int8_linear", "int8_linear_quantized", "int8_weight_only_linear"):
        raise ValueError(f"there are no sample arguments for the operator {op!r}")
    weight = {
        "weight": draw.integers(-127, 128, n, k, dtype=torch.int8),
        "weight_scale": draw.positive(n) * (spread / 73),
    }
    if op == "int8_linear_quantized":
        return {"x": x, "x_scale": draw.positive(m) / 73, **weight, **end, "out_dtype": dtype}
    if op == "int8_weight_only_linear":
        weight["compute_dtype"] = problem.compute_dtype
    return {"x": x, **weight, **end}


def _convolution(problem: Problem, draw: _Draw) -> dict[str, Any]:
    sizes = problem.conv
    if sizes is None:
        raise ValueError(f"{problem.op} without the sizes of a convolution")
    integer = problem.op == "int8_conv2d_fused"
    out_dtype = problem.out_dtype or problem.x_dtype

    def image(n: int, channels: int, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        if dtype.is_floating_point:
            return draw.normal(n, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)
        low = -127 if dtype == torch.int8 else 1
        return draw.integers(low, low + 255, n, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)

    window = (sizes.out_channels, *sizes.kernel, sizes.group_channels)
    spread = max(math.prod(window[1:]), 1) ** -0.5
    arguments: dict[str, Any] = {"x": image(sizes.batch, sizes.in_channels, sizes.height, sizes.width, problem.x_dtype)}
    if integer:
        arguments |= {
            "x_scale": 1 / 73,
            "weight": draw.integers(-127, 128, *window, dtype=torch.int8),
            "weight_scale": draw.positive(sizes.out_channels) * (spread / 73),
        }
    else:
        arguments["weight"] = (draw.normal(*window, dtype=torch.float32) * spread).to(problem.x_dtype)
    residual_dtype = problem.residual_dtype or (out_dtype if problem.residual else None)
    arguments |= {
        "bias": draw.normal(sizes.out_channels, dtype=torch.float32) if problem.bias else None,
        "residual": None if residual_dtype is None else image(*sizes.out_shape, residual_dtype),
        "stride": list(sizes.stride),
        "padding": list(sizes.padding),
        "dilation": list(sizes.dilation),
        "groups": sizes.groups,
        "activation": problem.activation,
    }
    if not integer:
        return arguments | {"allow_tf32": problem.allow_tf32}
    quantized = not out_dtype.is_floating_point
    return arguments | {"out_scale": 1 / 40 if quantized else None, "out_dtype": out_dtype}
