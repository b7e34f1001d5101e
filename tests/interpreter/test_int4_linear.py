"""W4A16 in Triton's interpreter. float16 and float32 alone: the interpreter is wrong for bfloat16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.interpreter.guard_page import guarded, survives
from tests.tolerance import assert_close_as_plain
from tilewright.kernels import matrices
from tilewright.kernels.activation import ACTIVATIONS
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats import int4
from tilewright.kernels.int4_linear import reference as definition
from tilewright.kernels.int4_linear import triton_dequantize, triton_fused
from tilewright.kernels.triton import int4_dequantize
from tilewright.kernels.triton.spans import kernel_order

FUSED, DEQUANTIZED = triton_fused.int4_linear, triton_dequantize.int4_linear
both_ways = pytest.mark.parametrize("int4_linear", [FUSED, DEQUANTIZED], ids=["fused", "dequantized"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_weight(n, k, group_size, symmetric=True, scale_dtype=torch.float32):
    """(canonical tensors by argument name, group_size)."""
    tensors = int4.quantize(torch.randn(n, k), group_size, symmetric, scale_dtype=scale_dtype)
    names = ("weight_packed", "weight_scale", "weight_zero")
    return {**dict(zip(names, tensors, strict=True)), "group_size": int4.resolve_group_size(k, group_size)}


def check(actual, x, weight, bias=None, residual=None, **options):
    plain = definition.int4_linear(x, **weight, bias=bias, residual=residual, **options)
    exact = definition.int4_linear(
        x.double(), **weight, bias=bias, residual=residual, activation=options.get("activation", "none")
    )
    assert_close_as_plain(actual, plain, exact)


def config_id(config):
    return f"{config.block_n}x{config.block_m}" + ("-split" if config.splits > 1 else "")


@pytest.mark.parametrize("group_size, symmetric", [(32, False), (64, True), (128, False), (None, True)])
@pytest.mark.parametrize("config", triton_fused.CONFIGS, ids=config_id)
def test_every_config_on_ragged_shapes(config, group_size, symmetric):
    dtype = torch.float32 if config == replace(triton_fused.FLOAT32, splits=config.splits) else torch.float16
    m, n, k = config.block_m + 3, config.block_n + 7, 200
    x, weight = torch.randn(m, k).to(dtype), make_weight(n, k, group_size, symmetric)
    out = torch.empty(m, n, dtype=dtype)
    order = kernel_order(*(weight[name] for name in ("weight_packed", "weight_scale", "weight_zero")), k=k,
                         group_size=weight["group_size"])  # fmt: skip
    launches = triton_fused.plan_span_product(
        triton_fused.int4_linear_kernel,
        x,
        None,
        order,
        out,
        bias=None,
        residual=None,
        activation="none",
        multiply_dtype=dtype,
        config=config,
        inline_ptx=False,
    )
    assert len(launches) == config.splits
    for launch in launches:
        launch.run()
    check(out, x, weight)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 192, 256, None])
@both_ways
def test_groups(int4_linear, group_size, symmetric):
    x, weight = torch.randn(5, 517).half(), make_weight(19, 517, group_size, symmetric)
    check(int4_linear(x, **weight), x, weight)


@pytest.mark.parametrize("group_size", [1, 7, 8, 40, 100])
def test_any_group_when_dequantized(group_size):
    x, weight = torch.randn(5, 117).half(), make_weight(19, 117, group_size, symmetric=False)
    check(DEQUANTIZED(x, **weight), x, weight)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@both_ways
def test_scale_dtypes(int4_linear, scale_dtype):
    x, weight = torch.randn(4, 256).half(), make_weight(24, 256, 64, scale_dtype=scale_dtype)
    check(int4_linear(x, **weight), x, weight)


@pytest.mark.parametrize("bias_dtype", [None, torch.float16, torch.float32])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@both_ways
def test_epilogue(int4_linear, activation, with_residual, bias_dtype):
    x, weight = torch.randn(3, 160).half(), make_weight(21, 160, 32)
    bias = None if bias_dtype is None else torch.randn(21).to(bias_dtype)
    residual = torch.randn(21, 3).half().t() if with_residual else None
    actual = int4_linear(x, **weight, bias=bias, residual=residual, activation=activation)
    check(actual, x, weight, bias, residual, activation=activation)


def test_epilogue_after_a_split_k():
    x, weight = torch.randn(3, 1200).half(), make_weight(21, 1200, 128, symmetric=False)
    options = {"bias": torch.randn(21), "residual": torch.randn(3, 21).half(), "activation": "gelu"}
    parts = triton_fused.FusedConfig.for_problem(Problem("int4_linear", 3, 21, 1200, torch.float16)).splits
    assert parts > 1
    check(FUSED(x, **weight, **options), x, weight, **options)


@pytest.mark.parametrize("compute_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@both_ways
def test_compute_dtype(int4_linear, dtype, compute_dtype):
    x, weight = torch.randn(5, 140).to(dtype), make_weight(17, 140, 64)
    actual = int4_linear(x, **weight, compute_dtype=compute_dtype)
    check(actual, x, weight, compute_dtype=compute_dtype)


LAYOUTS = {
    "transposed": lambda: torch.randn(140, 6).half().t(),
    "every other column": lambda: torch.randn(6, 280).half()[:, ::2],
    "rows of a wider matrix": lambda: torch.randn(6, 200).half()[:, 3:143],
    "one row repeated": lambda: torch.randn(1, 140).half().expand(6, 140),
    "three dimensions": lambda: torch.randn(2, 3, 140).half(),
    "permuted leading dimensions": lambda: torch.randn(3, 2, 140).half().transpose(0, 1),
    "one dimension": lambda: torch.randn(140).half(),
}


@pytest.mark.parametrize("name", LAYOUTS)
@both_ways
def test_strides_and_leading_dimensions(int4_linear, name):
    x, weight = LAYOUTS[name](), make_weight(17, 140, 32, symmetric=False)
    residual = torch.randn(*x.shape[:-1], 17).half()
    actual = int4_linear(x, **weight, residual=residual)
    assert actual.shape == (*x.shape[:-1], 17)
    check(actual, x, weight, residual=residual)


@pytest.mark.parametrize("m, n, k", [(0, 5, 64), (3, 0, 64), (3, 5, 0), (0, 0, 0), (1, 1, 1), (2, 1, 9), (17, 9, 8)])
@both_ways
def test_empty_and_tiny(int4_linear, m, n, k):
    x, weight = torch.randn(m, k).half(), make_weight(n, k, None, symmetric=False)
    bias = torch.randn(n)
    check(int4_linear(x, **weight, bias=bias), x, weight, bias)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@both_ways
def test_a_bad_row_stays_bad_and_alone(int4_linear, activation, bad):
    x, weight = torch.randn(20, 600).half(), make_weight(9, 600, 64)
    clean = int4_linear(x, **weight, activation=activation)
    x[5, 77] = bad
    actual = int4_linear(x, **weight, activation=activation)
    expected = definition.int4_linear(x, **weight, activation=activation)
    assert torch.equal(actual.isnan(), expected.isnan())
    others = torch.arange(20) != 5
    assert torch.equal(actual[others], clean[others])
    assert not torch.isfinite(expected[5]).all()


def test_a_row_does_not_depend_on_its_batch_and_runs_repeat():
    weight = make_weight(40, 1200, 128)
    x = torch.randn(16, 1200).half()
    full = FUSED(x, **weight)
    assert torch.equal(FUSED(x, **weight), full)
    for rows in (1, 3, 11):
        assert torch.equal(FUSED(x[:rows], **weight), full[:rows])


@pytest.mark.parametrize("group_size", [32, 64, 7, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dequantized_weights_agree_to_the_bit(dtype, group_size):
    weight = make_weight(30, 117, group_size, symmetric=False)
    tensors = [weight[name] for name in ("weight_packed", "weight_scale", "weight_zero")]
    expected = int4.dequantize(*tensors, weight["group_size"], 117, dtype=dtype)
    for first, last in [(0, 8), (8, 30)]:
        out = torch.full((last - first, 120), torch.nan, dtype=dtype)
        (config,) = triton_dequantize.CONFIGS
        (launch,) = int4_dequantize.plan_dequantize(
            *tensors, out, first_row=first, group_size=weight["group_size"], config=config
        )
        launch.run()
        assert torch.equal(out[:, :117], expected[first:last])


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_dequantized_in_several_blocks_of_rows(monkeypatch, activation):
    monkeypatch.setattr(matrices, "SCRATCH_BYTES", 1)
    n = matrices.ROWS + 9
    x, weight, bias = torch.randn(2, 40).half(), make_weight(n, 40, 8, symmetric=False), torch.randn(n).half()
    assert len(list(matrices.row_blocks(n, 40, torch.float16))) == 2
    check(DEQUANTIZED(x, **weight, bias=bias, activation=activation), x, weight, bias, activation=activation)


def test_rows_further_apart_than_32_bits_count():
    stride = 2**31 + 64
    storage = torch.empty(stride + 64, dtype=torch.float16)  # reserved, and touched only where the two rows lie
    x = storage.as_strided((2, 64), (stride, 1))
    x.copy_(torch.randn(2, 64))
    weight = make_weight(9, 64, 32)
    check(FUSED(x, **weight), x.clone(), weight)


@pytest.mark.parametrize("shape", [(3, 37, 133), (17, 130, 256), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("config", triton_fused.CONFIGS, ids=config_id)
def test_the_product_reads_nothing_past_its_tensors(config, shape):
    m, n, k = shape
    dtype = torch.float32 if config == replace(triton_fused.FLOAT32, splits=config.splits) else torch.float16
    weight = make_weight(n, k, 32, symmetric=False)
    order = kernel_order(weight["weight_packed"], weight["weight_scale"], weight["weight_zero"], 32, k)
    order = replace(order, weight=guarded(order.weight), scale=guarded(order.scale), zero=guarded(order.zero))
    launches = triton_fused.plan_span_product(
        triton_fused.int4_linear_kernel,
        guarded(torch.randn(m, k).to(dtype)),
        None,
        order,
        guarded(torch.empty(m, n, dtype=dtype)),
        bias=guarded(torch.randn(n)),
        residual=guarded(torch.randn(m, n).to(dtype)),
        activation="none",
        multiply_dtype=dtype,
        config=config,
        inline_ptx=False,
    )
    assert survives(lambda: [launch.run() for launch in launches])


@pytest.mark.parametrize("group_size", [7, 32])
def test_dequantising_reads_nothing_past_its_tensors(group_size):
    weight = make_weight(19, 117, group_size, symmetric=False)
    tensors = [guarded(weight[name]) for name in ("weight_packed", "weight_scale", "weight_zero")]
    out = guarded(torch.empty(11, 120, dtype=torch.float16))
    (launch,) = int4_dequantize.plan_dequantize(
        *tensors, out, first_row=8, group_size=group_size, config=triton_dequantize.CONFIGS[0]
    )
    assert survives(launch.run)


def test_groups_without_a_kernel_order_are_refused():
    with pytest.raises(ValueError, match="groups of 40 columns"):
        FUSED(torch.randn(2, 80).half(), **make_weight(3, 80, 40))


def test_a_config_with_other_parts_gives_the_same_within_float32_rounding():
    x, weight = torch.randn(4, 700).half(), make_weight(30, 700, 64, symmetric=False)
    order = kernel_order(weight["weight_packed"], weight["weight_scale"], weight["weight_zero"], 64, 700)
    end = {"bias": None, "residual": None, "activation": "none"}
    for splits in (3, 5, 16):
        out = torch.empty(4, 30, dtype=torch.float16)
        config = replace(triton_fused.CONFIGS[0], splits=splits)
        how = (torch.float16, config, False)
        for launch in triton_fused.plan_span_product(triton_fused.int4_linear_kernel, x, None, order, out, *how, **end):
            launch.run()
        check(out, x, weight)
