"""Rung 1: the references against float64 mathematics written a second time (``exact.py``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import exact
from tests.kernels.problems import LINEAR_OPS, Case, float64, make, plain
from tests.tolerance import assert_close_as_plain
from tilewright.kernels.activation import ACTIVATIONS, apply_activation
from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.card import REFERENCE, cards
from tilewright.kernels.dispatch.router import implementations
from tilewright.kernels.norm_quantize.reference import layer_norm_quantize, rms_norm_quantize
from tilewright.kernels.quantize.reference import quantize_per_row

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
properties = settings(max_examples=60, deadline=None, derandomize=True)


def reference(op: str) -> Any:
    return next(one for one in router.implementations(op) if one.name == "reference").function


def check(case: Case, seed: int = 0) -> None:
    arguments = make(case, seed)
    assert_close_as_plain(reference(case.op)(**arguments), plain(case, arguments), float64(case, arguments))


# ---- linear operators
@st.composite
def cases(draw: st.DrawFn, op: str) -> Case:
    floats = draw(st.sampled_from(FLOATS))
    return Case(
        op,
        m=draw(st.integers(0, 9)),
        n=draw(st.one_of(st.integers(0, 2), st.integers(32, 50))),
        k=draw(st.integers(0, 300)),
        dtype=floats,
        compute_dtype=draw(st.sampled_from([None, torch.bfloat16, torch.float32])),
        group_size=draw(st.sampled_from([32, 64, 128, -1, 5])),
        symmetric=draw(st.booleans()),
        scale_dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])) if op.startswith("int4") else torch.float32,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        channel_scale=draw(st.booleans()),
    )


@pytest.mark.parametrize("op", LINEAR_OPS)
@properties
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_any_problem(op: str, data: st.DataObject, seed: int) -> None:
    case = data.draw(cases(op))
    arguments = make(case, seed)
    expected = float64(case, arguments)
    y = reference(op)(**arguments)
    assert (y.shape, y.dtype) == ((case.m, case.n), case.dtype)
    if y.numel() >= 32:
        assert_close_as_plain(y, plain(case, arguments), expected)
    else:
        # Too few outputs for the statistics of the bar: a few units in the last place of the sums that went in.
        rounded_to = (case.dtype, (case.compute_dtype or case.dtype) if case.multiplies_floats else torch.float32)
        eps = max(torch.finfo(dtype).eps for dtype in rounded_to)
        assert torch.allclose(y.double(), expected, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_every_activation(op: str, activation: str) -> None:
    check(Case(op, m=8, activation=activation, residual=True))


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_leading_dimensions_and_strides(op: str) -> None:
    case = Case(op, m=24, n=32, k=72, residual=True)
    arguments = make(case)
    function = reference(op)
    flat = function(**arguments)
    shaped = {name: arguments[name] for name in ("x", "residual", "x_scale") if name in arguments}
    deep = {name: value.reshape(2, 3, 4, *value.shape[1:]) for name, value in shaped.items()}
    assert torch.equal(function(**arguments | deep), flat.view(2, 3, 4, 32))
    strided = {name: value.t().contiguous().t() for name, value in shaped.items()}
    assert torch.equal(function(**arguments | strided), flat)
    single = {name: value[5] for name, value in shaped.items()}
    assert_close_as_plain(
        function(**arguments | single), plain(case, arguments)[5], float64(case, arguments)[5]
    )  # not to the bit: a matrix-vector product may add up in another order


# ---- quantisers
def assert_quantized(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[np.ndarray, np.ndarray]) -> None:
    (q, scale), (q_expected, scale_expected) = actual, expected
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert np.array_equal(q.numpy(), q_expected)
    assert np.array_equal(scale.numpy(), scale_expected, equal_nan=True)


@properties
@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    dtype=st.sampled_from(FLOATS),
    magnitude=st.sampled_from([0.0, 1e-42, 1e-7, 1.0, 1e4]),
    smooth=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_quantize_per_row(shape: list[int], dtype: torch.dtype, magnitude: float, smooth: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=g) * magnitude).to(dtype)
    channel_scale = torch.rand(shape[-1], generator=g) + 0.5 if smooth else None
    assert_quantized(quantize_per_row(x, channel_scale), exact.quantize(x, channel_scale))


def test_ties_go_to_the_even_integer() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    q, scale = quantize_per_row(x)
    assert scale.item() == 1
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_quantising_a_row_that_holds_no_number_marks_that_row_alone() -> None:
    x = torch.randn(5, 40)
    x[1, 3], x[3, 7], x[4] = torch.nan, -torch.inf, 0
    q, scale = quantize_per_row(x)
    assert scale.isnan().tolist() == [False, True, False, False, False]
    assert scale.isinf().tolist() == [False, False, False, True, False]
    assert not q[[1, 3, 4]].any()
    assert scale[4] == 1
    clean_q, clean_scale = quantize_per_row(x[[0, 2]])
    assert torch.equal(q[[0, 2]], clean_q) and torch.equal(scale[[0, 2]], clean_scale)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norm_quantize(norm: str, affine: bool, dtype: torch.dtype) -> None:
    """float64 norms: quantised values may sit one apart where a float32 norm falls on the other side of a tie."""
    x = (torch.randn(6, 96) * 3 + 1).to(dtype)
    weight, bias = (torch.randn(96), torch.randn(96)) if affine else (None, None)
    x64 = exact.array(x)
    if norm == "rms":
        q, scale = rms_norm_quantize(x, weight, eps=1e-3)
        normed = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-3)
    else:
        q, scale = layer_norm_quantize(x, weight, bias, eps=1e-3)
        centred = x64 - x64.mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3)
    if affine:
        normed = normed * exact.array(weight) + (exact.array(bias) if norm == "layer" else 0)
    assert np.allclose(scale.numpy(), np.abs(normed).max(-1) / 127, rtol=1e-6)
    exact_levels = normed / (np.abs(normed).max(-1, keepdims=True) / 127)
    assert (np.abs(q.numpy() - exact_levels) <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1), (7,)], ids=str)
def test_norm_quantize_of_empty_and_single_inputs(shape: tuple[int, ...]) -> None:
    for quantize in (rms_norm_quantize, layer_norm_quantize):
        q, scale = quantize(torch.randn(shape))
        assert (q.shape, scale.shape) == (shape, shape[:-1])


# ---- special values
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", LINEAR_OPS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_a_row_without_a_number_stays_without_one_and_alone(op: str, bad: float, activation: str) -> None:
    case = Case(op, m=4, activation=activation)
    arguments = make(case)
    clean = reference(op)(**arguments)
    name = "x_scale" if op == "int8_linear_quantized" else "x"
    arguments[name] = arguments[name].clone()
    arguments[name].view(4, -1)[2, 0] = bad
    y = reference(op)(**arguments)
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])
    if op in ("int8_linear", "int4_int8_linear"):
        assert y[2].isnan().all()
    elif activation == "none":
        assert not y[2].isfinite().any()
    elif bad != bad:
        assert y[2].isnan().all()


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_a_huge_row_and_a_zero_row_change_no_other(op: str) -> None:
    case = Case(op, m=4, bias=True)
    arguments = make(case)
    clean = reference(op)(**arguments)
    name = "x_scale" if op == "int8_linear_quantized" else "x"
    arguments[name] = arguments[name].clone()
    arguments[name][1] *= 1e30
    arguments["x"] = arguments["x"].clone()
    arguments["x"][2] = 0
    y = reference(op)(**arguments)
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    assert torch.equal(y[2], arguments["bias"])
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 999, dtype=torch.float64), torch.tensor([torch.nan])])
    actual, expected = apply_activation(x, name), exact.activate(x.numpy(), name)
    assert np.allclose(actual.numpy(), expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    written_over = x.clone()
    assert torch.equal(apply_activation(written_over, name, inplace=True)[:-1], actual[:-1])


def test_activations_are_those_of_pytorch() -> None:
    x = torch.randn(100)
    for name, theirs in (("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu)):
        assert torch.equal(apply_activation(x, name), theirs(x))


def test_every_operator_has_a_reference() -> None:
    for card in cards():
        last = implementations(card.name)[-1]
        assert last.name == REFERENCE and callable(last.function)
