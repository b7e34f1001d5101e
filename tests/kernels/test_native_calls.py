"""Calls of linear layers that were prepared for x of one shape: the bits of any other call, whatever x is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tilewright.kernels.cpu import linear, native
from tilewright.kernels.dispatch.card import card_of, make_arguments
from tilewright.kernels.dispatch.problem import Problem

OPS = ("int8_linear", "int4_int8_linear", "int4_linear", "int8_weight_only_linear")
PREPARE: dict[str, Any] = {
    "int8_linear": linear.prepare_int8,
    "int4_int8_linear": linear.prepare_int4_int8,
    "int4_linear": linear.prepare_weight_only,
    "int8_weight_only_linear": linear.prepare_weight_only,
}


def prepared(
    op: str, m: int, n: int, k: int, dtype: torch.dtype, symmetric: bool = True
) -> tuple[linear.Prepared, torch.Tensor]:
    """The C kernel of a random weight, and x [m, k]."""
    options: dict[str, Any] = {"group_size": 32, "symmetric": symmetric} if op.startswith("int4") else {}
    card, problem = card_of(op), Problem(op, m, n, k, dtype, bias=True, activation="silu", **options)
    assert card is not None
    arguments = make_arguments(problem)
    x = arguments.pop("x")
    arguments.pop("residual")
    return PREPARE[op](**arguments, k=k), x


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("m", [1, 2, 3, 6, 7, 13, 40, 500])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_gives_the_bits_of_any_other_call(isa: str, op: str, m: int, dtype: torch.dtype):
    call, x = prepared(op, m, 70, 100, dtype)
    for shape in ((m, 100), (1, m, 100)):
        fast, given = call.for_rows(torch.Size(shape), dtype), x.view(shape)
        expected = call(given)
        y = fast(given)
        assert y.shape == expected.shape and y.dtype == dtype and torch.equal(y, expected)
        assert not y.isnan().any()
        residual = torch.randn(expected.shape).to(dtype)
        assert torch.equal(fast(given, residual), call(given, residual))


@pytest.mark.parametrize("op", OPS)
def test_takes_x_of_any_strides(isa: str, op: str):
    call, x = prepared(op, 3, 70, 100, torch.float32)
    fast, expected = call.for_rows(x.shape, x.dtype), call(x)
    wide = torch.full((3, 105), math.nan)
    wide[:, 1:101] = x
    for same in (x.t().contiguous().t(), wide[:, 1:101]):
        assert torch.equal(fast(same), expected)


@pytest.mark.parametrize("op", OPS)
def test_takes_as_many_threads_as_there_are(isa: str, op: str):
    call, x = prepared(op, 4, 256, 512, torch.float32)  # enough for several
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        fast, expected = call.for_rows(x.shape, x.dtype), call(x)
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            assert torch.equal(fast(x), expected)
            assert torch.equal(call.for_rows(x.shape, x.dtype)(x), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_however_threads_share_the_work_the_bits_are_the_same(isa: str, op: str, symmetric: bool, dtype: torch.dtype):
    """Few rows, which every thread converts for itself; up to 12, in halves of panels; some, which all wait for; and
    many, of which each thread takes its own.
    """
    if not symmetric and op.startswith("int8"):
        pytest.skip("has no zero points")
    n, k = 200, 640
    call, x = prepared(op, 300, n, k, dtype, symmetric)
    before = torch.get_num_threads()
    alone = torch.cat([call(row[None]) for row in x])
    try:
        for m in (1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 20, 60, 75, 100, 300):
            torch.set_num_threads(1)
            expected = call(x[:m])
            if isa != "amx" or not op.endswith(("int4_linear", "weight_only_linear")):
                assert torch.equal(expected, alone[:m]), m
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(call(x[:m]), expected), (m, threads)
                assert torch.equal(call.for_rows(x[:m].shape, dtype)(x[:m]), expected), (m, threads)
    finally:
        torch.set_num_threads(before)


def test_results_are_not_the_same_memory():
    if native.why_no_native():
        pytest.skip(str(native.why_no_native()))
    call, x = prepared("int8_linear", 1, 16, 64, torch.float32)
    fast = call.for_rows(x.shape, x.dtype)
    first = fast(x)
    kept = first.clone()
    second = fast(2 * x)
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, kept)
