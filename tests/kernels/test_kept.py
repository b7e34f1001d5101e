"""Weights that are kept dequantised beside the compact ones, on every instruction set there is here."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import nn

from tests.kernels.problems import Case, float64, make, plain
from tests.tolerance import assert_close_as_plain
from tilewright import autotune
from tilewright.kernels import tuning
from tilewright.kernels.cpu import choices, kept, native
from tilewright.kernels.dispatch.packed import packed_bytes
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import implementations, route
from tilewright.kernels.layer_trials import trials
from tilewright.nn import Int4Linear, Int8Linear, Int8WeightOnlyLinear

OPS = ("int8_weight_only_linear", "int4_linear")
KINDS = (Int8WeightOnlyLinear, Int4Linear)
needs_kernels = pytest.mark.skipif(native.why_no_native() is not None, reason=str(native.why_no_native()))


def function(op: str) -> Any:
    return next(one.function for one in implementations(op) if one.name == kept.NAME)


def problem(op: str = "int4_linear", m: int = 704, **facts: Any) -> Problem:
    options = {"group_size": 128, "keep_dequantized": True, "compute_dtype": torch.float32, **facts}
    return Problem(op, m, options.pop("n", 2048), options.pop("k", 2048), torch.float32, **options)


def layer(kind: type, n: int = 72, k: int = 200, **options: Any) -> Any:
    return kind.from_float(nn.Linear(k, n), keep_dequantized=True, **options).eval()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("compute", [None, *native.DTYPES], ids=str)
@pytest.mark.parametrize("m, activation, residual", [(1, "none", False), (5, "gelu", True), (33, "relu", False)])
def test_agrees_with_float64(
    isa: str, op: str, dtype: torch.dtype, compute: torch.dtype | None, m: int, activation: str, residual: bool
):
    case = Case(op, m=m, n=50, k=200, dtype=dtype, compute_dtype=compute, activation=activation, residual=residual)
    case = case.with_(symmetric=m > 1, bias=m < 33)
    if kept.held_dtype(dtype, compute) is None:
        pytest.skip("the library has no form for this dtype here")
    arguments = make(case, m)
    y = function(op)(**arguments, keep_dequantized=True)
    assert y.dtype == dtype
    if kept.held_dtype(dtype, compute) == torch.bfloat16:  # whose product the library rounds
        exact = float64(case, arguments)
        assert (y.double() - exact).norm() <= 2**-7 * exact.norm()
    else:
        assert_close_as_plain(y, plain(case, arguments), float64(case, arguments))


def test_bfloat16_is_kept_where_it_is_multiplied_fastest(isa: str):
    assert kept.held_dtype(torch.float32, torch.float32) == torch.float32
    assert kept.held_dtype(torch.float64, None) is None
    held = {"amx": torch.bfloat16, "avx512_bf16": None}.get(isa, torch.float32)
    assert kept.held_dtype(torch.float32, torch.bfloat16) == held


def test_only_where_it_was_asked_for(isa: str):
    """And then where the library is faster, which the C kernel with its epilogue, or with tiles of AMX, is not."""
    assert route(problem(keep_dequantized=False)).name != kept.NAME
    assert route(problem(m=1)).name == "C kernel"
    assert (route(problem()).name == kept.NAME) == (isa != "amx")
    assert route(problem(activation="gelu")).name != kept.NAME
    bfloat16 = route(problem(compute_dtype=torch.bfloat16)).name
    assert (bfloat16 == kept.NAME) == (isa != "avx512_bf16")


def test_what_is_not_asked_for_is_declined():
    declined = {one.name: one.why_not(problem(keep_dequantized=False)) for one in implementations("int4_linear")}
    assert declined[kept.NAME] == "the weight is not kept dequantised"


def test_a_timing_of_one_does_not_count_for_the_other():
    assert tuning.facts_of(problem()) != tuning.facts_of(problem(keep_dequantized=False))
    assert tuning.facts_of(problem(keep_dequantized=False)) == {
        key: value for key, value in tuning.facts_of(problem()).items() if key != "keep"
    }


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every call that may use a kept weight does."""
    if native.why_no_native():
        pytest.skip(str(native.why_no_native()))
    with (
        autotune.constraints(tuning.implementation_of("int4_linear").name, implementation=kept.NAME),
        autotune.constraints(tuning.implementation_of("int8_weight_only_linear").name, implementation=kept.NAME),
        torch.no_grad(),
    ):
        yield


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_follows_what_is_written(kind: type, compute: torch.dtype, always: None):
    made, x = layer(kind, compute_dtype=compute), torch.randn(6, 200)
    if kept.held_dtype(torch.float32, compute) is None:
        pytest.skip("nothing is kept in this dtype here")

    def check() -> None:
        expected = nn.functional.linear(x, made.dequantize_weight(), made.bias)
        for _ in range(3):
            assert (made(x) - expected).norm() <= 0.01 * expected.norm()

    check()
    made.weight = nn.Parameter(torch.randn(72, 200))
    check()
    made.weight.mul_(3)
    check()
    made.weight_scale.mul_(2)
    check()
    made.load_state_dict(layer(kind, compute_dtype=compute).state_dict())
    check()


@pytest.mark.parametrize("kind", KINDS)
def test_is_part_of_no_copy_and_no_file(kind: type, always: None):
    made, x = layer(kind, compute_dtype=torch.float32), torch.randn(6, 200)
    before, size = list(made.state_dict()), len(_pickled(made))
    for _ in range(3):
        y = made(x)
    assert list(made.state_dict()) == before
    assert len(_pickled(made)) < size + 1000 < size + 4 * 72 * 200
    for other in (copy.deepcopy(made), torch.load(io.BytesIO(_pickled(made)), weights_only=False)):
        assert other.keep_dequantized and torch.equal(other(x), y)
    assert type(made)(**made.config()).keep_dequantized


def _pickled(module: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(module, file)
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_casts_with_its_layer(kind: type, always: None):
    made, x = layer(kind, compute_dtype=torch.float32), torch.randn(6, 200)
    for _ in range(2):
        made(x)
    made.to(torch.bfloat16)
    expected = nn.functional.linear(x, made.dequantize_weight(), made.bias.float())
    for _ in range(3):
        y = made(x.bfloat16())
        assert y.dtype == torch.bfloat16 and (y - expected).norm() <= 0.01 * expected.norm()


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_that_are_held(kind: type, monkeypatch: pytest.MonkeyPatch):
    held = kept.held_dtype(torch.float32, torch.bfloat16)
    if held is None:
        pytest.skip("nothing is kept in bfloat16 here")
    monkeypatch.setitem(choices.KEPT, held, (16, 0))
    gc.collect()
    made = layer(kind, compute_dtype=torch.bfloat16)
    with torch.inference_mode():
        for _ in range(3):
            made(torch.randn(1, 200))
        gc.collect()
        few = packed_bytes()
        for _ in range(3):
            made(torch.randn(64, 200))
    assert made.kept_bytes() == 72 * 200 * held.itemsize
    assert packed_bytes() - few == made.kept_bytes()
    del made
    gc.collect()
    assert packed_bytes() < few


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_is_tried_beside_the_others(kind: type):
    made = [layer(kind, compute_dtype=torch.float32) for _ in range(2)]
    tried = trials(made[0].problem(24), [each._arguments() for each in made])
    for _ in range(3):
        for name in ("C kernel", "dequantised blocks", kept.NAME):
            assert tried.check(tried.run(name)) is None


def test_nothing_is_kept_unasked():
    made = Int4Linear.from_float(nn.Linear(64, 32))
    assert made.kept_bytes() == 0 and not made.keep_dequantized and "keep_dequantized" not in made.config()
    assert Int8Linear.from_float(nn.Linear(64, 32)).kept_bytes() == 0
    asked = layer(Int4Linear)
    assert asked.config()["keep_dequantized"] is True and "keep_dequantized=True" in repr(asked)
    with pytest.raises(TypeError, match="keep_dequantized is True or False"):
        Int4Linear(64, 32, keep_dequantized="yes")
