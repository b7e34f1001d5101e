"""The comparisons of the GPU tests, on a CPU: the definition passes them, and something near it does not."""

from __future__ import annotations

import pytest
import torch

from bench.problems import LINEAR, OPS, QUANTIZERS, Shape, make_arguments, reference
from tests.gpu.compare import check, check_dense_weight
from tilewright.kernels.formats import int4

SHAPE = Shape(9, 40, 70, torch.float16, group_size=32, symmetric=False, residual=True, activation="silu")


@pytest.mark.parametrize("op", OPS)
def test_the_definition_passes(op: str) -> None:
    arguments = make_arguments(op, SHAPE)
    check(op, reference(op)(**arguments), arguments)


@pytest.mark.parametrize("op", LINEAR)
def test_a_product_that_lacks_its_last_column_fails(op: str) -> None:
    arguments = make_arguments(op, SHAPE)
    x = arguments["x"].clone()
    x[:, -1] = 0
    with pytest.raises(AssertionError, match="exceeds"):
        check(op, reference(op)(**{**arguments, "x": x}), arguments)


@pytest.mark.parametrize("op", QUANTIZERS)
def test_one_integer_off_by_one_fails(op: str) -> None:
    arguments = make_arguments(op, SHAPE)
    q, scale = reference(op)(**arguments)
    q[3, 5] += 1 if q[3, 5] < 0 else -1
    with pytest.raises(AssertionError, match="integers differ|not the nearest integer"):
        check(op, (q, scale), arguments)


@pytest.mark.parametrize("op", QUANTIZERS)
def test_a_scale_off_by_its_last_places_fails(op: str) -> None:
    arguments = make_arguments(op, SHAPE)
    q, scale = reference(op)(**arguments)
    with pytest.raises(AssertionError, match="scales differ"):
        check(op, (q, scale * (1 + 2**-18)), arguments)


def test_a_dense_weight_is_compared_to_the_bit() -> None:
    arguments = make_arguments("int4_linear", SHAPE)
    names = ("weight_packed", "weight_scale", "weight_zero")
    dense = int4.dequantize(*(arguments[name] for name in names), 32, 70, dtype=torch.float32).half()
    check_dense_weight(dense, arguments)
    dense[1, 2] += 0.25
    with pytest.raises(AssertionError, match="weights differ"):
        check_dense_weight(dense, arguments)


def test_arguments_depend_on_the_seed_alone() -> None:
    first, again, other = (make_arguments("int8_linear", SHAPE, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first["x"], again["x"]) and torch.equal(first["weight"], again["weight"])
    assert not torch.equal(first["x"], other["x"])
