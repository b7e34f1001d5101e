"""The cards of ``int8_conv2d_fused`` and of the two quantisers that make its input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from tilewright.kernels import convolution
from tilewright.kernels.checks import check_input, check_vector
from tilewright.kernels.conv_geometry import empty_channels_last
from tilewright.kernels.conv_gradients import smooth_conv
from tilewright.kernels.convolution import INTEGERS
from tilewright.kernels.dispatch.card import Arguments, Card, everywhere, on_cpu, on_gpu
from tilewright.kernels.dispatch.derivatives import fold_images, fold_rows
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.formats.weight import SCALE_DTYPES, Draw
from tilewright.kernels.int8_conv2d.reference import integers


def _check_scale(op: str, name: str, value: float | None) -> None:
    """``value``, if given, is positive and finite."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{op}: {name} must be positive and finite, not {value}")


def _check_zero_point(op: str, name: str, value: int, quantized: bool = True) -> None:
    """``value`` is one of the integers that quantised values have, or 0 where there are none."""
    if not -127 <= value <= 127:
        raise ValueError(f"{op}: {name} must lie in -127 to 127, not {value}")
    if value and not quantized:
        raise ValueError(f"{op}: {name} must be 0 where there are no integers, not {value}")


# ---- int8_conv2d_fused
def _check(op: str, arguments: Arguments) -> convolution.Checked:
    x, weight, residual = (arguments[name] for name in ("x", "weight", "residual"))
    if x.dtype not in INTEGERS:
        raise TypeError(f"{op}: x must be int8 or uint8, not {x.dtype}")
    if weight.dtype != torch.int8:
        raise TypeError(f"{op}: weight must be int8, not {weight.dtype}")
    geometry = convolution.check_window(op, arguments)
    if arguments["weight_scale"].dtype != torch.float32:
        raise TypeError(f"{op}: weight_scale must be float32, not {arguments['weight_scale'].dtype}")
    check_vector(op, "weight_scale", arguments["weight_scale"], geometry.out_channels)
    if residual is not None and residual.dtype not in (*INTEGERS, *SCALE_DTYPES):
        raise TypeError(f"{op}: residual must be int8, uint8, float16, bfloat16 or float32, not {residual.dtype}")
    for name in ("x_scale", "residual_scale", "out_scale"):
        _check_scale(op, name, arguments[name])
    _check_zero_point(op, "x_zero_point", arguments["x_zero_point"])
    if arguments["x_nonnegative"] and arguments["x_zero_point"]:
        raise ValueError(f"{op}: x_nonnegative is a promise about integers whose zero point is 0")
    integers = residual is not None and residual.dtype in INTEGERS
    _check_zero_point(op, "residual_zero_point", arguments["residual_zero_point"], integers)
    _check_zero_point(op, "out_zero_point", arguments["out_zero_point"], arguments["out_scale"] is not None)
    return geometry, _out_dtype(op, arguments)


def _out_dtype(op: str, arguments: Arguments) -> torch.dtype:
    dtype: torch.dtype | None = arguments["out_dtype"]
    quantized = arguments["out_scale"] is not None
    if dtype is None:
        return torch.int8 if quantized else torch.float32
    allowed = INTEGERS if quantized else SCALE_DTYPES
    if dtype not in allowed:
        names = ", ".join(str(each).removeprefix("torch.") for each in allowed)
        raise TypeError(
            f"{op}: out_dtype must be one of {names} {'with' if quantized else 'without'} out_scale: {dtype}"
        )
    return dtype


def _smooth(arguments: Arguments) -> torch.Tensor | None:
    """None for integers, which have no derivative."""
    if arguments["out_scale"] is not None:
        return None
    x, residual = arguments["x"], arguments["residual"]
    if residual is not None and residual.dtype in INTEGERS:
        residual = integers(residual, torch.float32) - arguments["residual_zero_point"]
    if residual is not None:
        residual = residual.float() * arguments["residual_scale"]
    weight = arguments["weight"].float() * arguments["weight_scale"].view(-1, 1, 1, 1)
    image = (integers(x, torch.float32) - arguments["x_zero_point"]) * arguments["x_scale"]
    return smooth_conv({**arguments, "x": image, "weight": weight, "residual": residual})


def _sample(problem: Problem, draw: Draw) -> dict[str, Any]:
    sizes, x = convolution.sizes_of(problem), convolution.input_of(problem, draw)
    out_dtype = problem.out_dtype or problem.x_dtype
    return {
        "x": x,
        "x_scale": 1 / 73,
        "weight": draw.integers(-127, 128, sizes.out_channels, *sizes.kernel, sizes.group_channels, dtype=torch.int8),
        "weight_scale": draw.positive(sizes.out_channels) * (convolution.spread_of(problem) / 73),
        **convolution.rest_of(problem, draw),
        "out_scale": None if out_dtype.is_floating_point else 1 / 40,
        "out_dtype": out_dtype,
    }


# ---- quantize_per_tensor
def _check_quantize(op: str, arguments: Arguments) -> torch.dtype:
    check_input(op, arguments["x"])
    _check_scale(op, "scale", arguments["scale"])
    _check_zero_point(op, "zero_point", arguments["zero_point"])
    dtype: torch.dtype = arguments["out_dtype"] or torch.int8
    if dtype not in INTEGERS:
        raise TypeError(f"{op}: out_dtype must be int8 or uint8, not {dtype}")
    return dtype


def _check_quantize_marked(op: str, arguments: Arguments) -> torch.dtype:
    dims, given = arguments["x"].dim(), arguments["sample_dims"]
    most = 1 if dims == 4 else max(dims - 1, 0)  # rows of an image are no samples
    if not 0 <= given <= most:
        raise ValueError(f"{op}: sample_dims must be 0 to {most} for x of {dims} dimensions, not {given}")
    return _check_quantize(op, arguments)


def _quantize_problem(op: str, arguments: Arguments, dtype: torch.dtype) -> Problem:
    x = arguments["x"]
    k = x.shape[-1] if x.dim() else 1
    return Problem(op, x.numel() // max(k, 1), 0, k, x.dtype, out_dtype=dtype, **device_facts(x.device))


def _fake_quantize(arguments: Arguments, dtype: torch.dtype) -> torch.Tensor:
    x = arguments["x"]
    if x.dim() == 4:
        return empty_channels_last(x.shape, dtype, x.device)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _fake_quantize_marked(arguments: Arguments, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = arguments["x"]
    marks = torch.empty(x.shape[: arguments["sample_dims"]], dtype=torch.float32, device=x.device)
    return _fake_quantize(arguments, dtype), marks


def _sample_quantize_marked(problem: Problem, draw: Draw) -> dict[str, Any]:
    return {**_sample_quantize(problem, draw), "sample_dims": 1}


def _sample_quantize(problem: Problem, draw: Draw) -> dict[str, Any]:
    return {"x": draw.normal(problem.m, problem.k, dtype=problem.x_dtype), "scale": 1 / 40}


def _fold_quantize(arguments: Arguments, dims: Mapping[str, int], size: int) -> Any:
    """Images stay images: their result is channels-last."""
    images = arguments["x"].dim() == 5
    return (fold_images if images else fold_rows)("x")(arguments, dims, size)


def _fold_marked(arguments: Arguments, dims: Mapping[str, int], size: int) -> Any:
    """What has samples has more of them; of what is one sample the batch makes samples."""
    if arguments["sample_dims"]:
        return fold_images("x")(arguments, dims, size)
    if arguments["x"].dim() == 1:
        return None
    return fold_rows("x")({**arguments, "sample_dims": 1}, dims, size)


CARDS = (
    Card(
        "int8_conv2d_fused",
        __package__,
        "(Tensor x, float x_scale, Tensor weight, Tensor weight_scale, Tensor? bias=None, Tensor? residual=None, "
        f"float residual_scale=1.0, {convolution.WINDOW}, {convolution.ACTIVATION}, float? out_scale=None, "
        "ScalarType? out_dtype=None, bool x_nonnegative=False, int x_zero_point=0, int residual_zero_point=0, "
        "int out_zero_point=0) -> Tensor",
        _check,
        convolution.posed,
        convolution.fake,
        _sample,
        convolution.example("int8_conv2d_fused", torch.int8),
        implementations=(
            *convolution.ON_GPU,
            on_cpu("C", ".cpu"),
            on_cpu("oneDNN", ".cpu:onednn_int8_conv2d_fused", ".cpu:why_not_onednn"),
            everywhere("reference", ".reference"),
        ),
        kernels=convolution.KERNELS,
        differentiable=("bias", "residual"),
        smooth=_smooth,
        fold=fold_images("x", "residual"),
        integer=True,
    ),
    Card(
        "quantize_per_tensor",
        __package__,
        "(Tensor x, float scale, ScalarType? out_dtype=None, int zero_point=0) -> Tensor",
        _check_quantize,
        _quantize_problem,
        _fake_quantize,
        _sample_quantize,
        Problem("quantize_per_tensor", 5, 0, 96, torch.float32, out_dtype=torch.int8),
        implementations=(
            on_gpu("Triton", ".triton_quantize"),
            on_cpu("C", ".cpu", ".cpu:why_not_quantize"),
            everywhere("reference", ".reference"),
        ),
        smooth=lambda arguments: None,
        fold=_fold_quantize,
    ),
    Card(
        "quantize_per_tensor_marked",
        __package__,
        "(Tensor x, float scale, int sample_dims, ScalarType? out_dtype=None, int zero_point=0) -> (Tensor, Tensor)",
        _check_quantize_marked,
        _quantize_problem,
        _fake_quantize_marked,
        _sample_quantize_marked,
        Problem("quantize_per_tensor_marked", 5, 0, 96, torch.float32, out_dtype=torch.int8),
        implementations=(
            on_gpu("Triton", ".triton_quantize"),
            on_cpu("C", ".cpu", ".cpu:why_not_quantize"),
            everywhere("reference", ".reference"),
        ),
        smooth=lambda arguments: (None, None),
        fold=_fold_marked,
    ),
)
