"""2:4 linear layers unpacked in registers, in Triton's interpreter. float16 and int8 alone: the interpreter is wrong
for bfloat16. ``mma.sp`` is inline PTX, which the interpreter does not run: see tests/kernels/test_emulated.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.problems import SPARSE, Shape, make_arguments
from tests.gpu.compare import check
from tests.interpreter.guard_page import guarded, survives
from tilewright.kernels.sparse24_linear import triton_unpack

RUN: dict[str, Any] = {op: getattr(triton_unpack, op) for op in SPARSE}
each_op = pytest.mark.parametrize("op", SPARSE)


@each_op
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (3, 70, 75), (17, 65, 1030), (40, 5, 512)])
def test_ragged_shapes(op: str, m: int, n: int, k: int) -> None:
    shape = Shape(m, n, k, torch.float16, symmetric=False, activation="relu", residual=True)
    arguments = make_arguments(op, shape)
    check(op, RUN[op](**arguments), arguments)


@pytest.mark.parametrize("group_size, k", [(128, 300), (256, 1100), (None, 300)])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_groups_of_int4(group_size: int | None, k: int, symmetric: bool) -> None:
    op = "sparse24_int4_linear"
    arguments = make_arguments(op, Shape(5, 40, k, torch.float16, group_size=group_size, symmetric=symmetric))
    check(op, RUN[op](**arguments), arguments)


def test_groups_that_cut_a_block_are_refused_in_words() -> None:
    op = "sparse24_int4_linear"
    arguments = make_arguments(op, Shape(2, 8, 256, torch.float16, group_size=64))
    with pytest.raises(ValueError, match="groups of 64 columns are neither a multiple of 128 nor the whole row"):
        RUN[op](**arguments)


@each_op
@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 0, 8), (3, 8, 0)], ids=str)
def test_empty_problems(op: str, shape: tuple[int, int, int]) -> None:
    arguments = make_arguments(op, Shape(*shape, torch.float16))
    y = RUN[op](**arguments)
    assert y.shape == shape[:2]
    if y.numel():
        torch.testing.assert_close(y, arguments["bias"].expand_as(y))


@each_op
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_without_a_number_stays_without_one_and_alone(op: str, bad: float) -> None:
    arguments = make_arguments(op, Shape(6, 20, 300, torch.float16))
    clean = RUN[op](**arguments)
    arguments["x"][3] = bad
    y = RUN[op](**arguments)
    assert torch.equal(y[[0, 1, 2, 4, 5]], clean[[0, 1, 2, 4, 5]])
    assert not y[3].isfinite().any()


@each_op
def test_nothing_outside_the_tensors_is_read_or_written(op: str) -> None:
    arguments = make_arguments(op, Shape(3, 5, 75, torch.float16, residual=True))

    def run() -> None:
        RUN[op](**{n: guarded(v) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()})

    assert survives(run)
