"""The C kernel that multiplies by a compressed 2:4 weight, on every instruction set of this processor that has it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.tolerance import assert_close_as_plain
from tilewright.kernels.activation import apply_activation
from tilewright.kernels.cpu import native
from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats import sparse24
from tilewright.kernels.sparse24_linear import compressed, cpu, reference
from tilewright.nn import Sparse24Linear

NAME = "C kernel, 2:4"
quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def sparse24_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    meta: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return compressed.prepare_float(values, meta, bias, activation, compute_dtype, x.shape[-1])(x, residual)


@pytest.fixture
def built(isa: str) -> str:
    """The instruction set, of those that the kernel is built for."""
    if "not built" in (compressed.why_not(Problem("sparse24_linear", 1, 64, 64, torch.float32)) or ""):
        pytest.skip(f"needs an expand instruction, which {isa} has not")
    return isa


def sparse_weight(n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(n, k).to(dtype)
    return sparse24.pack(weight, sparse24.best_mask(torch.rand(n, k)))


@quick
@given(
    m=st.integers(1, compressed.MOST_ROWS),
    n=st.integers(1, 150),
    k=st.one_of(st.integers(1, 100), st.integers(490, 1100)),
    dtypes=st.sampled_from(
        [
            (torch.float32, None),
            (torch.bfloat16, None),
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, None),
            (torch.float16, torch.float16),
            (torch.float32, torch.bfloat16),
        ]
    ),
    activation=st.sampled_from(tuple(native.ACTIVATIONS)),
    extras=st.sets(st.sampled_from(("bias", "residual", "strided"))),
    seed=st.integers(0, 1000),
)
def test_agrees_with_float64(
    built: str,
    m: int,
    n: int,
    k: int,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    activation: str,
    extras: set[str],
    seed: int,
):
    torch.manual_seed(seed)
    n = max(n, -(-64 // m))  # at a few elements the plain expression may happen to be exact
    values_dtype, compute_dtype = dtypes
    values, meta = sparse_weight(n, k, values_dtype)
    # What compute_dtype holds, so that the reference does not round it.
    x = torch.randn(m, k, dtype=compute_dtype or torch.float32).float()
    if "strided" in extras:
        x = x.t().contiguous().t() if seed % 2 else torch.cat([x, x], 1)[:, k:]
    bias = torch.randn(n) if "bias" in extras else None
    residual = torch.randn(m, n) if "residual" in extras else None
    arguments = (values, meta, bias, residual, activation, compute_dtype)
    actual = sparse24_linear(x, *arguments)
    plain = reference.sparse24_linear(x, *arguments)
    weight = sparse24.unpack(values, meta, k).to(compute_dtype or torch.float32).double()
    exact = apply_activation(x.double() @ weight.t() + (0 if bias is None else bias.double()), activation)
    assert_close_as_plain(actual, plain, exact + (0 if residual is None else residual.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_pair_of_places_is_read(built: str, dtype: torch.dtype):
    # Whole numbers, whose sums are exact in any order.
    nibbles = torch.tensor(sparse24.VALID, dtype=torch.uint8)
    n, k = 37, 4 * 23
    picked = nibbles[torch.randint(0, 6, (n, 24))]
    picked[:, 23] = 0
    meta = picked[:, ::2] | picked[:, 1::2] << 4
    values = torch.randint(-9, 10, (n, 2 * 23)).to(dtype)
    x = torch.randint(-9, 10, (5, k)).float()
    assert torch.equal(sparse24_linear(x, values, meta), x @ sparse24.unpack(values, meta, k).float().t())


def test_long_sums_are_as_exact_as_short_ones(built: str):
    errors = []
    for k in (512, 16384):
        values, meta = sparse_weight(64, k)
        values, x = values.abs(), torch.rand(4, k)
        exact = x.double() @ sparse24.unpack(values, meta, k).double().t()
        errors.append(((sparse24_linear(x, values, meta) - exact) / exact).norm())
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_stays_alone_and_is_bad_throughout(built: str, bad: float):
    values, meta = sparse_weight(70, 70)
    x = torch.randn(9, 70)
    clean = sparse24_linear(x, values, meta, activation="gelu")
    x[3, 7], x[5, 69] = bad, bad
    y = sparse24_linear(x, values, meta, activation="none")
    assert not y[[3, 5]].isfinite().any()
    y = sparse24_linear(x, values, meta, activation="gelu")
    good = [0, 1, 2, 4, 6, 7, 8]
    assert torch.equal(y[good], clean[good])


@pytest.mark.parametrize("k", [100, 1100])
def test_result_depends_neither_on_the_batch_nor_on_threads(built: str, k: int):
    values, meta = sparse_weight(1037, k, torch.bfloat16)  # enough for several threads even at one row and k = 1100
    x = torch.randn(compressed.MOST_ROWS, k)
    whole = sparse24_linear(x, values, meta, activation="silu")
    alone = torch.cat([sparse24_linear(row[None], values, meta, activation="silu") for row in x])
    assert torch.equal(whole, alone)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(sparse24_linear(x, values, meta, activation="silu"), whole)
    finally:
        torch.set_num_threads(threads)


def test_a_layer_calls_it_and_notices_what_is_written(built: str):
    layer = Sparse24Linear.from_float(nn.Linear(200, 72), activation="relu")
    assert router.route(layer.problem(3, torch.float32)).name == NAME
    x = torch.randn(2, 3, 200)
    with torch.inference_mode():
        for _ in range(3):  # through the operator, then past it
            expected = (x @ layer.dequantize_weight().t() + layer.bias).relu()
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer(x[1]), layer(x)[1])
    with torch.no_grad():
        for tensor in (layer.weight_values, layer.bias):
            before = layer(x)
            tensor.mul_(-2)
            after = layer(x)
            assert not torch.equal(before, after)
            expected = (x @ layer.dequantize_weight().t() + layer.bias).relu()
            torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def test_a_residual_of_another_shape_and_leading_dimensions(built: str):
    values, meta = sparse_weight(40, 48)
    x, residual = torch.randn(2, 3, 48), torch.randn(3, 2, 40).transpose(0, 1)
    y = sparse24_linear(x, values, meta, None, residual)
    torch.testing.assert_close(y, sparse24_linear(x, values, meta) + residual)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"m": 0}, "nothing to multiply"),
        ({"m": compressed.MOST_ROWS + 1}, "a dense product is faster"),
        ({"m": 4, "n": 4096, "k": 4096, "compute_dtype": torch.bfloat16}, "oneDNN's in bfloat16 is faster"),
        ({"x_dtype": torch.bfloat16}, "takes rows in float32"),
        ({"compute_dtype": torch.float64}, "does not multiply in torch.float64"),
        ({"activation": "leaky_relu"}, "does not have the activation leaky_relu"),
    ],
)
def test_declines_in_words(isa: str, changes: dict[str, object], words: str):
    if "compute_dtype" in changes and cpu.why_no_prepacked() is not None:
        pytest.skip("oneDNN's product in bfloat16 cannot be used")
    problem = Problem(**{"op": "sparse24_linear", "m": 4, "n": 64, "k": 64, "x_dtype": torch.float32, **changes})
    assert words in dict(router.route(problem).declined)[NAME]


def test_is_declined_where_it_is_not_built(isa: str):
    problem = Problem("sparse24_linear", 4, 64, 64, torch.float32)
    if isa.startswith(("avx512", "amx")):
        assert router.route(problem).name == NAME
        return
    assert f"is not built for {isa}" in dict(router.route(problem).declined)[NAME]
    values, meta = sparse_weight(8, 16)
    with pytest.raises(RuntimeError, match="not built"):
        sparse24_linear(torch.randn(2, 16), values, meta)
