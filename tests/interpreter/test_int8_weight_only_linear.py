"""W8A16 matrix products in the interpreter (float16 and float32; it computes bfloat16 wrongly)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.interpreter.guard_page import guarded, survives
from tests.tolerance import assert_close_as_plain
from tilewright.kernels.activation import ACTIVATIONS, apply_activation
from tilewright.kernels.epilogue import finish
from tilewright.kernels.int8_weight_only_linear import dequantize, reference, triton_dequantize, triton_swapped
from tilewright.kernels.int8_weight_only_linear.triton_swapped import CONFIGS, int8_weight_only_linear, plan_swapped

FUNCTIONS = [
    int8_weight_only_linear,
    dequantize.int8_weight_only_linear,
    triton_dequantize.int8_weight_only_linear,
]
# Warps and stages mean nothing to the interpreter: one config for each shape of a tile.
FAMILIES = list({replace(config, num_warps=0, num_stages=0): config for config in CONFIGS}.values())


def make_case(m: int, n: int, k: int, dtype: torch.dtype, extras: bool = True) -> tuple:
    """x, weight, weight_scale, bias, residual."""
    generator = torch.Generator().manual_seed(m * 1000 + n + k)
    x = torch.randn(m, k, generator=generator).to(dtype)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    scale = torch.rand(n, generator=generator) * 1e-3 + 1e-3
    if not extras:
        return x, weight, scale, None, None
    bias, residual = torch.randn(n, generator=generator), torch.randn(n, m, generator=generator).t()
    return x, weight, scale, bias.to(dtype), residual.to(dtype)


def arguments_of(case: tuple, activation: str = "none") -> dict:
    return {
        **dict(zip(("x", "weight", "weight_scale", "bias", "residual"), case, strict=True)),
        "activation": activation,
    }


def assert_as_good(out: torch.Tensor, case: tuple, activation: str, compute: torch.dtype) -> None:
    """Against the plain expression with a weight dequantised to the compute dtype."""
    x, weight, scale, bias, residual = case
    exact = x.to(compute).double() @ weight.double().t() * scale.double()
    exact = finish(exact, bias, residual, activation, torch.float64)
    y = torch.nn.functional.linear(x.to(compute), (weight * scale[:, None]).to(compute)).to(x.dtype)
    y = apply_activation(y if bias is None else y + bias, activation)
    assert_close_as_plain(out, y if residual is None else y + residual, exact)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: f"{c.block_m}x{c.block_n}x{c.block_k}-split{c.split_k}")
@pytest.mark.parametrize("aligned", [True, False], ids=["even-fp16", "ragged-fp32"])
def test_every_config(config, aligned):
    dtype = torch.float16 if aligned else torch.float32
    compute = torch.float32 if config.block_k == triton_swapped.FLOAT32.block_k else torch.float16
    m, n, k = (config.block_m, config.block_n, 256) if aligned else (config.block_m - 3, config.block_n + 5, 99)
    case = make_case(m, n, k, dtype)
    out = torch.full((m, n), torch.nan, dtype=dtype)
    for launch in plan_swapped(**arguments_of(case, "silu"), compute_dtype=compute, out=out, config=config):
        launch.run()
    assert_as_good(out, case, "silu", compute)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_activation(function, dtype, activation):
    case = make_case(5, 37, 50, dtype)
    assert_as_good(function(**arguments_of(case, activation)), case, activation, dtype)


@pytest.mark.parametrize("m", [5, triton_swapped.CAST_ON_LOAD_M + 1])
@pytest.mark.parametrize("compute", [torch.float16, torch.float32], ids=str)
def test_a_float32_model_computes_in_the_compute_dtype(compute, m):
    case = make_case(m, 37, 50, torch.float32)
    out = int8_weight_only_linear(**arguments_of(case), compute_dtype=compute)
    assert out.dtype == torch.float32
    assert_as_good(out, case, "none", compute)
    expected = reference.int8_weight_only_linear(**arguments_of(case), compute_dtype=compute)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_value_that_is_not_finite_marks_its_row_and_no_other(function, bad):
    x, weight, scale, _, _ = make_case(4, 21, 40, torch.float16, extras=False)
    clean = function(x, weight, scale)
    x[1, 7] = bad
    out = function(x, weight, scale)
    assert not torch.isfinite(out[1, weight[:, 7] != 0]).any()
    assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("n, k", [(17, 40), (1, 1), (0, 8), (8, 0)])
def test_any_shape(function, leading, n, k):
    _, weight, scale, bias, _ = make_case(1, n, k, torch.float32)
    x = torch.randn((*leading, k), generator=torch.Generator().manual_seed(0))
    out = function(x, weight, scale, bias=bias, activation="relu")
    expected = reference.int8_weight_only_linear(x, weight, scale, bias, activation="relu")
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_any_strides():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator).t()
    weight = torch.randint(-127, 128, (32, 20), dtype=torch.int8, generator=generator).t()
    scale, bias = torch.rand(40, generator=generator)[::2], torch.randn(40, generator=generator)[::2]
    residual = torch.randn(20, generator=generator)
    for batch in (x, x.expand(2, 6, 32)[:, ::2], x[:1].expand(6, 32)):
        ours = int8_weight_only_linear(batch, weight, scale, bias=bias, residual=residual)
        theirs = reference.int8_weight_only_linear(batch, weight, scale, bias=bias, residual=residual)
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-3)  # sums of 32 terms of about 100


@pytest.mark.parametrize("m", [16, 40])
def test_a_row_does_not_depend_on_its_batch(m):
    x, weight, scale, bias, residual = case = make_case(m, 30, 1100, torch.float16)
    whole = int8_weight_only_linear(**arguments_of(case, "gelu"))
    first = 0 if m <= triton_swapped.SMALL_M else triton_swapped.SMALL_M + 1
    for rows in (slice(m - max(first, 1), m), slice(0, max(first, 3))):
        part = int8_weight_only_linear(**arguments_of((x[rows], weight, scale, bias, residual[rows]), "gelu"))
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: f"{c.block_m}x{c.block_n}x{c.block_k}-split{c.split_k}")
def test_nothing_outside_the_tensors_is_touched(config):
    case = [guarded(tensor) for tensor in make_case(5, 21, 150, torch.float16)]
    out = guarded(torch.zeros(5, 21, dtype=torch.float16))
    compute = torch.float32 if config.block_k == 32 else torch.float16
    launches = plan_swapped(**arguments_of(case), compute_dtype=compute, out=out, config=config)
    assert survives(lambda: [launch.run() for launch in launches])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_value_is_widened_and_nothing_else_touched(dtype):
    n, k = 37, 3 * 256 + 5
    weight = (torch.arange(n * k) % 256 - 128).to(torch.int8).reshape(n, k)
    given, out = guarded(weight), guarded(torch.full((n, k), torch.nan, dtype=dtype))
    assert len(range(0, n * k, triton_dequantize.BLOCK)) > 2
    assert survives(triton_dequantize.plan_widen(given, out).run)
    assert torch.equal(out, weight.to(dtype))
