"""W4A8 in Triton's interpreter. float16 and float32 alone: the interpreter is wrong for bfloat16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.interpreter.guard_page import guarded, survives
from tests.tolerance import assert_close_as_plain
from tilewright.kernels.activation import ACTIVATIONS, apply_activation
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats import int4
from tilewright.kernels.int4_int8_linear import reference as definition
from tilewright.kernels.int4_int8_linear import triton_dequantize, triton_fused
from tilewright.kernels.int4_int8_linear.triton_fused import int4_int8_linear
from tilewright.kernels.quantize.reference import quantize_per_row
from tilewright.kernels.triton.spans import kernel_order


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_weight(n, k, group_size, symmetric=True, scale_dtype=torch.float32):
    """(canonical tensors by argument name, group_size)."""
    tensors = int4.quantize(torch.randn(n, k), group_size, symmetric, scale_dtype=scale_dtype)
    names = ("weight_packed", "weight_scale", "weight_zero")
    return {**dict(zip(names, tensors, strict=True)), "group_size": int4.resolve_group_size(k, group_size)}


def check(actual, x, weight, bias=None, residual=None, activation="none", channel_scale=None):
    """Against float64 mathematics on the operands as quantised, which both sides must agree on to the bit."""
    options = {"bias": bias, "residual": residual, "activation": activation, "channel_scale": channel_scale}
    plain = definition.int4_int8_linear(x, **weight, **options)
    q, x_scale = quantize_per_row(x, channel_scale)
    w = int4.dequantize(*weight.values(), k=x.shape[-1], dtype=torch.float64)
    exact = q.double() @ w.t() * x_scale.double().unsqueeze(-1)
    if bias is not None:
        exact = exact + bias.double()
    exact = apply_activation(exact, activation)
    if residual is not None:
        exact = exact + residual.double()
    assert_close_as_plain(actual, plain, exact)


def plan(x, weight, out, config):
    q, x_scale = quantize_per_row(x)
    tensors = (weight[name] for name in ("weight_packed", "weight_scale", "weight_zero"))
    order = kernel_order(*tensors, group_size=weight["group_size"], k=x.shape[-1])
    end = {"bias": None, "residual": None, "activation": "none"}
    kernel = triton_fused.int4_int8_linear_kernel
    return triton_fused.plan_span_product(kernel, q, x_scale, order, out, torch.int8, config, False, **end)


def config_id(config):
    return f"{config.block_n}x{config.block_m}" + ("-split" if config.splits > 1 else "")


@pytest.mark.parametrize("group_size, symmetric", [(32, False), (64, True), (128, False), (None, True)])
@pytest.mark.parametrize("config", triton_fused.CONFIGS, ids=config_id)
def test_every_config_on_ragged_shapes(config, group_size, symmetric):
    m, n, k = config.block_m + 3, config.block_n + 7, 200
    x, weight = torch.randn(m, k).half(), make_weight(n, k, group_size, symmetric)
    out = torch.empty(m, n, dtype=x.dtype)
    launches = plan(x, weight, out, config)
    assert len(launches) == config.splits
    for launch in launches:
        launch.run()
    check(out, x, weight)


@pytest.mark.parametrize("config", triton_fused.CONFIGS, ids=config_id)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, 128, None])
def test_integer_sums_are_exact(group_size, symmetric, config):
    """With scales that are powers of two, float32 holds every sum exactly, so nothing may differ."""
    k = 256
    x = torch.randint(-127, 128, (5, k)).float()
    x[:, 0] = 127.0
    weight = make_weight(20, k, group_size, symmetric)
    weight["weight_scale"] = torch.exp2(torch.randint(-2, 3, weight["weight_scale"].shape).float())
    out = torch.empty(5, 20)
    for launch in plan(x, weight, out, config):
        launch.run()
    assert torch.equal(out, definition.int4_int8_linear(x, **weight))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 192, 256, None])
def test_groups(group_size, symmetric, scale_dtype):
    x, weight = torch.randn(5, 517), make_weight(19, 517, group_size, symmetric, scale_dtype)
    check(int4_int8_linear(x, **weight), x, weight)


@pytest.mark.parametrize("bias_dtype", [None, torch.float16, torch.float32])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("k", [160, 1200], ids=["whole", "split"])
def test_epilogue(k, activation, with_residual, bias_dtype):
    x, weight = torch.randn(3, k).half(), make_weight(21, k, 32)
    bias = None if bias_dtype is None else torch.randn(21).to(bias_dtype)
    residual = torch.randn(21, 3).half().t() if with_residual else None
    parts = triton_fused.Int4Int8Config.for_problem(Problem("int4_int8_linear", 3, 21, k, x.dtype)).splits
    assert (parts > 1) == (k > 1000)
    actual = int4_int8_linear(x, **weight, bias=bias, residual=residual, activation=activation)
    check(actual, x, weight, bias, residual, activation)


def test_channel_scale():
    x, weight = torch.randn(5, 200).half(), make_weight(19, 200, 64)
    channel_scale = torch.rand(400)[::2] + 0.5
    check(int4_int8_linear(x, **weight, channel_scale=channel_scale), x, weight, channel_scale=channel_scale)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, 40, 128, None])
@pytest.mark.parametrize("m, n, k", [(300, 517, 320), (9, 21, 1000), (2, 1, 9), (0, 5, 64), (3, 0, 64)])
def test_dequantised_once(m, n, k, group_size, symmetric):
    x, weight = torch.randn(m, k).half(), make_weight(n, k, group_size, symmetric, torch.float16)
    bias, residual = torch.randn(n).half(), torch.randn(n, m).half().t()
    end = {"bias": bias, "residual": residual, "activation": "gelu", "channel_scale": torch.rand(k) + 0.5}
    check(triton_dequantize.int4_int8_linear(x, **weight, **end), x, weight, **end)


LAYOUTS = {
    "transposed": lambda: torch.randn(140, 6).half().t(),
    "every other column": lambda: torch.randn(6, 280).half()[:, ::2],
    "one row repeated": lambda: torch.randn(1, 140).half().expand(6, 140),
    "permuted leading dimensions": lambda: torch.randn(3, 2, 140).half().transpose(0, 1),
    "one dimension": lambda: torch.randn(140).half(),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_strides_and_leading_dimensions(name):
    x, weight = LAYOUTS[name](), make_weight(17, 140, 32, symmetric=False)
    residual = torch.randn(*x.shape[:-1], 17).half()
    actual = int4_int8_linear(x, **weight, residual=residual)
    assert actual.shape == (*x.shape[:-1], 17)
    check(actual, x, weight, residual=residual)


@pytest.mark.parametrize("m, n, k", [(0, 5, 64), (3, 0, 64), (3, 5, 0), (0, 0, 0), (1, 1, 1), (2, 1, 9), (17, 9, 8)])
def test_empty_and_tiny(m, n, k):
    x, weight, bias = torch.randn(m, k), make_weight(n, k, None, symmetric=False), torch.randn(n)
    check(int4_int8_linear(x, **weight, bias=bias), x, weight, bias)


@pytest.mark.parametrize("shape", [(3, 37, 133), (17, 130, 256), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("config", triton_fused.CONFIGS, ids=config_id)
def test_the_product_reads_nothing_past_its_tensors(config, shape):
    m, n, k = shape
    weight = make_weight(n, k, 32, symmetric=False)
    order = kernel_order(weight["weight_packed"], weight["weight_scale"], weight["weight_zero"], 32, k)
    order = replace(order, weight=guarded(order.weight), scale=guarded(order.scale), zero=guarded(order.zero))
    launches = triton_fused.plan_span_product(
        triton_fused.int4_int8_linear_kernel,
        guarded(torch.ones(m, k, dtype=torch.int8)),
        guarded(torch.ones(m)),
        order,
        guarded(torch.empty(m, n)),
        torch.int8,
        bias=guarded(torch.randn(n)),
        residual=guarded(torch.randn(m, n)),
        activation="none",
        config=config,
        inline_ptx=False,
    )
    assert survives(lambda: [launch.run() for launch in launches])


def test_a_zero_row_is_zero():
    x, weight = torch.randn(4, 200), make_weight(9, 200, 64, symmetric=False)
    x[2] = 0.0
    assert not int4_int8_linear(x, **weight)[2].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("k", [200, 1200], ids=["whole", "split"])
def test_a_bad_row_stays_bad_and_alone(k, activation, bad):
    x, weight = torch.randn(6, k), make_weight(9, k, 64)
    clean = int4_int8_linear(x, **weight, activation=activation)
    x[5, 77] = bad
    actual = int4_int8_linear(x, **weight, activation=activation)
    assert actual[5].isnan().all()
    assert torch.equal(actual[:5], clean[:5])


def test_a_row_does_not_depend_on_its_batch_and_runs_repeat():
    x, weight = torch.randn(16, 1200), make_weight(40, 1200, 128)
    full = int4_int8_linear(x, **weight)
    assert torch.equal(int4_int8_linear(x, **weight), full)
    for rows in (1, 3, 11):
        assert torch.equal(int4_int8_linear(x[:rows], **weight), full[:rows])


def test_a_long_row_of_extremes_does_not_overflow():
    """|q * (u - z)| = 127 * 15 over 16,384 columns: the sum needs 25 bits."""
    k = 2**14
    weight = {
        "weight_packed": torch.full((1, k // 8), -1, dtype=torch.int32),
        "weight_scale": torch.ones(1, 1),
        "weight_zero": torch.zeros(1, 1, dtype=torch.int32),
        "group_size": k,
    }
    actual = int4_int8_linear(torch.full((1, k), -127.0), **weight)
    assert actual.item() == -127 * 15 * k
