"""``WeightFormat``: what each one says of a weight fits what it does, and what the operators demand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.kernels.formats import int4, int8, sparse24
from tilewright.kernels.formats.int4 import Int4
from tilewright.kernels.formats.int8 import Int8
from tilewright.kernels.formats.sparse24 import Sparse24
from tilewright.kernels.formats.weight import Draw, Float, Spec, WeightFormat

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
properties = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def formats(draw: st.DrawFn) -> WeightFormat:
    dense: WeightFormat = draw(
        st.one_of(
            st.just(Int8()),
            st.builds(Float, st.sampled_from([*DTYPES, torch.float64])),
            st.builds(Int4, st.sampled_from([2, 16, 64, None, -1]), st.booleans(), st.sampled_from(DTYPES)),
        )
    )
    return Sparse24(dense) if draw(st.booleans()) else dense


def arguments_of(weight: WeightFormat, operands: dict[str, Any], k: int) -> dict[str, Any]:
    """What the operator would be called with, by the names of its schema."""
    return {**operands, **weight.options(k)}


@properties
@given(weight=formats(), n=st.integers(0, 20), k=st.integers(0, 150), seed=st.integers(0, 99))
def test_a_sample_is_what_the_format_says_and_the_operators_take(
    weight: WeightFormat, n: int, k: int, seed: int
) -> None:
    specs, made = weight.operands(n, k), weight.sample(Draw(seed=seed), n, k)
    assert tuple(made) == weight.names
    assert {name: Spec(tuple(t.shape), t.dtype) for name, t in made.items() if t is not None} == specs
    assert set(weight.names) <= set(weight.NAMES)
    assert tuple(specs) == tuple(name for name in weight.names if name in specs)
    assert weight.nbytes(n, k) == sum(t.numel() * t.element_size() for t in made.values() if t is not None)
    arguments = arguments_of(weight, made, k)
    assert type(weight).check("some_linear", arguments, k) == n
    found = type(weight).of_arguments(arguments, k)
    assert (found.options(k), found.facts(k), found.operands(n, k)) == (weight.options(k), weight.facts(k), specs)
    assert type(weight).of_arguments({**made, **found.options(k)}, k) == found


@properties
@given(weight=formats(), n=st.integers(1, 20), k=st.integers(1, 150), seed=st.integers(0, 99))
def test_a_quantised_weight_has_the_same_operands_and_comes_back(
    weight: WeightFormat, n: int, k: int, seed: int
) -> None:
    dense = Draw(seed=seed).normal(n, k)
    if isinstance(weight, Sparse24):
        dense *= sparse24.best_mask(dense.abs())
    made = weight.quantize(dense)
    assert tuple(made) == weight.names
    assert {name: Spec(tuple(t.shape), t.dtype) for name, t in made.items() if t is not None} == weight.operands(n, k)
    back = weight.dequantize(made, k)
    assert back.dtype == torch.float32
    assert weight.dequantize(made, k, torch.float64).dtype == torch.float64
    inner = weight.values if isinstance(weight, Sparse24) else weight
    # int4: what lies past the last level is off by half a step more than rounding.
    steps = {"float": 2.0**8, "int8": 127 * 2, "int4": 7.5}[inner.name]
    assert (back - dense).abs().max() <= dense.abs().max() / steps * 1.02
    if inner.name != "int4":
        torch.testing.assert_close(weight.dequantize(weight.quantize(back), k), back)


def test_quantising_is_that_of_the_functions() -> None:
    dense, importance = Draw(seed=1).normal(24, 70), Draw(seed=2).positive(70)
    for name in ("minmax", "mse"):
        assert all(
            map(torch.equal, Int8().quantize(dense, name, importance).values(), int8.quantize(dense, name, importance))
        )
        made = Int4(16, False, torch.bfloat16).quantize(dense, name, importance)
        assert all(map(torch.equal, made.values(), int4.quantize(dense, 16, False, name, torch.bfloat16, importance)))
    values, meta = sparse24.pack(dense, sparse24.best_mask(dense.abs()))
    made = Sparse24(Int4(8, False)).quantize(dense)
    expected = int4.quantize(values, 8, False)
    assert torch.equal(made["weight_meta"], meta)
    assert all(
        torch.equal(made[name], t) for name, t in zip(("weight_values", *int4.Int4.NAMES[1:]), expected, strict=True)
    )
    assert torch.equal(Sparse24(Float()).quantize(dense)["weight_values"], values)
    mask = torch.zeros(24, 70, dtype=torch.bool)
    mask[:, 1] = True
    kept = Sparse24(Float()).dequantize(Sparse24(Float()).quantize(dense, mask=mask), 70)
    assert torch.equal(kept, dense * mask)


@pytest.mark.parametrize("weight", [Int8(), Int4(32, False), Float(), Sparse24(Float()), Sparse24(Int8())], ids=str)
def test_sums_over_a_sample_are_of_order_one(weight: WeightFormat) -> None:
    draw = Draw(seed=3)
    dense = weight.dequantize(weight.sample(draw, 64, 512), 512)
    assert 0.7 < float((draw.normal(64, 512) @ dense.t()).std()) < 1.5
    half = weight.dequantize(weight.sample(Draw(seed=3), 64, 512, spread=0.01), 512)
    assert 0.007 < float(half[half != 0].std()) < 0.015


def test_nothing_is_drawn_on_meta() -> None:
    for weight in (Int8(), Int4(symmetric=False), Sparse24(Int4(64))):
        made = weight.sample(Draw("meta"), 16, 256)
        assert all(t.is_meta for t in made.values() if t is not None)


def test_group_sizes_of_a_sparse_weight_are_given_in_columns() -> None:
    assert Sparse24(Int4(16)).facts(80) == {"group_size": 32, "symmetric": True, "scale_dtype": torch.float32}
    assert Sparse24(Int4(64)).options(80) == {"group_size": 80}
    assert Sparse24(Int8()).options(80) == {} == Sparse24(Float()).facts(80)
    assert Sparse24(Float()).names == ("weight_values", "weight_meta")


def test_a_weight_that_a_format_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the weight overflows torch\.float16"):
        Float(torch.float16).quantize(torch.full((4, 4), 1e6))
    with pytest.raises(ValueError, match="must be finite, but holds NaN or Inf"):
        Sparse24(Float()).quantize(torch.full((4, 4), torch.inf))
    with pytest.raises(ValueError, match="importance"):
        Sparse24(Int8()).quantize(torch.ones(4, 4), importance=torch.ones(4))
    with pytest.raises(ValueError, match="a weight without its weight_scale"):
        Int8().dequantize({"weight": torch.zeros(4, 4, dtype=torch.int8)}, 4)


BAD: list[tuple[WeightFormat, str, Any, type[Exception], str]] = [
    (Int8(), "weight", torch.zeros(4, 64), TypeError, "op: weight must be int8, not torch.float32"),
    (
        Int8(),
        "weight",
        torch.zeros(64, dtype=torch.int8),
        ValueError,
        "op: weight must be a matrix [N, K], not of shape [64]",
    ),
    (
        Int8(),
        "weight",
        torch.zeros(4, 60, dtype=torch.int8),
        ValueError,
        "op: the last dimension of x is 64, but the weight takes 60",
    ),
    (Int8(), "weight_scale", torch.ones(4).half(), TypeError, "op: weight_scale must be float32, not torch.float16"),
    (Int8(), "weight_scale", torch.ones(5), ValueError, "op: weight_scale must have shape [4], not [5]"),
    (Int4(16), "group_size", 0, ValueError, "op: group_size must be positive, not 0"),
    (Int4(16), "weight_packed", torch.zeros(4, 8), TypeError, "op: weight_packed must be int32, not torch.float32"),
    (
        Int4(16),
        "weight_packed",
        torch.zeros(8, dtype=torch.int32),
        ValueError,
        "op: weight_packed must be a matrix [N, ceil(K / 8)], not of shape [8]",
    ),
    (
        Int4(16),
        "weight_packed",
        torch.zeros(4, 9, dtype=torch.int32),
        ValueError,
        "op: the last dimension of x is 64, which needs 8 words a row, but weight_packed has 9",
    ),
    (
        Int4(16),
        "weight_scale",
        torch.ones(4, 4).double(),
        TypeError,
        "op: weight_scale must be float16, bfloat16 or float32, not torch.float64",
    ),
    (
        Int4(16),
        "weight_scale",
        torch.ones(4, 5),
        ValueError,
        "op: weight_scale must have shape [4, 4] for group_size 16, not [4, 5]",
    ),
    (Int4(16), "weight_zero", torch.zeros(1, 4), TypeError, "op: weight_zero must be int32, not torch.float32"),
    (
        Int4(16),
        "weight_zero",
        torch.zeros(4, 4, dtype=torch.int32),
        ValueError,
        "op: weight_zero must have shape [1, 4], not [4, 4]",
    ),
    (
        Sparse24(Int8()),
        "weight_values",
        torch.zeros(32, dtype=torch.int8),
        ValueError,
        "op: weight_values must be a matrix, not of shape [32]",
    ),
    (
        Sparse24(Int8()),
        "weight_meta",
        torch.zeros(4, 8, dtype=torch.int8),
        TypeError,
        "op: weight_meta must be uint8, not torch.int8",
    ),
    (
        Sparse24(Int8()),
        "weight_meta",
        torch.zeros(4, 9, dtype=torch.uint8),
        ValueError,
        "op: the last dimension of x is 64, so weight_meta must have shape [4, 8], not [4, 9]",
    ),
    (
        Sparse24(Int8()),
        "weight_values",
        torch.zeros(4, 32),
        TypeError,
        "op: weight_values must be int8, not torch.float32",
    ),
    (
        Sparse24(Int8()),
        "weight_values",
        torch.zeros(4, 33, dtype=torch.int8),
        ValueError,
        "op: the last dimension of x is 64, so weight_values must have shape [4, 32], not [4, 33]",
    ),
    (Sparse24(Int8()), "weight_scale", torch.ones(3), ValueError, "op: weight_scale must have shape [4], not [3]"),
    (
        Sparse24(Float()),
        "weight_values",
        torch.zeros(4, 32, dtype=torch.int8),
        TypeError,
        "op: weight_values must be a float tensor of 16, 32 or 64 bits, not torch.int8",
    ),
    (
        Sparse24(Int4(8)),
        "group_size",
        18,
        ValueError,
        "op: group_size must be a multiple of 4 or the whole row, not 18",
    ),
    (
        Sparse24(Int4(8)),
        "weight_values",
        torch.zeros(4, 4),
        TypeError,
        "op: weight_values must be int32, not torch.float32",
    ),
    (
        Sparse24(Int4(8)),
        "weight_scale",
        torch.ones(4, 3),
        ValueError,
        "op: weight_scale must have shape [4, 4] for group_size 16, not [4, 3]",
    ),
    (
        Sparse24(Int4(8)),
        "weight_values",
        torch.zeros(4, 5, dtype=torch.int32),
        ValueError,
        "op: the last dimension of x is 64, so weight_values must have shape [4, 4], not [4, 5]",
    ),
]


@pytest.mark.parametrize("weight, name, value, error, text", BAD, ids=[f"{bad[0]}-{bad[4][4:40]}" for bad in BAD])
def test_what_is_wrong_with_a_weight_is_said(
    weight: WeightFormat, name: str, value: Any, error: type[Exception], text: str
) -> None:
    arguments = arguments_of(weight, weight.sample(Draw(), 4, 64), 64)
    with pytest.raises(error) as raised:
        type(weight).check("op", {**arguments, name: value}, 64)
    assert str(raised.value) == text
