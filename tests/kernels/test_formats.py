"""Weight formats against definitions written a second time, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.exact import array, int4_weight, nibbles
from tilewright.kernels.formats import int4, int8, ranges

sizes = st.integers(0, 70)
group_sizes = st.sampled_from([32, 64, 128, None, -1, 1, 5])
properties = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def weights(draw: st.DrawFn, smallest: int = 0) -> torch.Tensor:
    """Random matrices of every size, of several scales, some with an outlier, a zero row or equal values."""
    n, k = draw(st.integers(smallest, 40)), draw(st.integers(smallest, 200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(n, k, generator=generator) * draw(st.sampled_from([1e-6, 0.02, 1.0, 1e6]))
    kind = draw(st.sampled_from(["plain", "outlier", "zero row", "equal", "positive"]))
    if kind == "equal":
        weight.fill_(draw(st.sampled_from([0.0, 0.3, -7.0])))
    elif kind == "positive":
        weight.abs_()
    elif weight.numel() and kind == "outlier":
        weight.view(-1)[draw(st.integers(0, n * k - 1))] *= 1e4
    elif n and kind == "zero row":
        weight[draw(st.integers(0, n - 1))] = 0
    return weight


# ---- packing
@properties
@given(rows=sizes, columns=sizes, seed=st.integers(0, 2**31))
def test_pack_is_undone_by_unpack(rows: int, columns: int, seed: int) -> None:
    values = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = int4.pack(values)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, -(-columns // 8))
    assert torch.equal(int4.unpack(packed, columns), values)
    assert np.array_equal(nibbles(packed, columns), values.numpy())


@properties
@given(rows=sizes, groups=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_zero_points_are_packed_along_rows(rows: int, groups: int, seed: int) -> None:
    zero = torch.randint(0, 16, (rows, groups), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = int4.pack_zero(zero)
    assert packed.shape == (-(-rows // 8), groups)
    assert packed.is_contiguous()
    assert torch.equal(int4.unpack_zero(packed, rows), zero)
    assert np.array_equal(nibbles(packed.t().contiguous(), rows).T, zero.numpy())


def test_unused_nibbles_are_zero() -> None:
    packed = int4.pack(torch.full((3, 9), 15, dtype=torch.uint8))
    assert packed.tolist() == [[-1, 15]] * 3


def test_int4_bytes_are_those_of_onnx_matmulnbits() -> None:
    """ONNX Runtime's B: uint8, the low nibble is the even column, the high one the odd column."""
    u = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    as_bytes = int4.pack(u).numpy().view(np.uint8)
    assert np.array_equal(as_bytes, (u[:, 0::2] | u[:, 1::2] << 4).numpy())


def test_int4_words_are_gptq_qweight_transposed() -> None:
    """GPTQ's qweight [K / 8, N]: word [i, n] holds column 8 i + j of output n in bits 4 j to 4 j + 3."""
    u = torch.randint(0, 16, (5, 64), dtype=torch.uint8).numpy().astype(np.uint32)
    qweight = np.zeros((8, 5), dtype=np.uint32)
    for i in range(8):
        for j in range(8):
            qweight[i] |= u[:, 8 * i + j] << np.uint32(4 * j)
    packed = int4.pack(torch.from_numpy(u.astype(np.uint8)))
    assert np.array_equal(packed.numpy(), qweight.view(np.int32).T)


# ---- quantising
@properties
@given(weight=weights())
def test_int8_error_is_at_most_half_a_step(weight: torch.Tensor) -> None:
    q, scale = int8.quantize(weight)
    assert (q.dtype, scale.dtype, q.shape, scale.shape) == (torch.int8, torch.float32, weight.shape, weight.shape[:1])
    assert not (q == -128).any()
    assert (scale > 0).all()
    error = np.abs(array(q) * array(scale)[:, None] - array(weight))
    assert (error <= (0.5 + 1e-4) * array(scale)[:, None]).all()
    largest = array(weight).__abs__().max(axis=1, initial=0.0)
    assert np.allclose(array(scale), np.where(largest > 0, largest / 127, 1.0), rtol=1e-6)
    assert torch.equal(int8.dequantize(q, scale), q.float() * scale[:, None])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@properties
@given(weight=weights(), group_size=group_sizes)
def test_int4_error_is_at_most_half_a_step(
    symmetric: bool, scale_dtype: torch.dtype, weight: torch.Tensor, group_size: int | None
) -> None:
    """Scales in 16 bits may be rounded down by one part in 256, which the farthest of the 15 steps feels 15 times."""
    packed, scale, zero = int4.quantize(weight, group_size, symmetric, scale_dtype=scale_dtype)
    n, k = weight.shape
    size = max(k, 1) if group_size in (None, -1) else min(group_size, max(k, 1))
    groups = -(-k // size)
    assert (packed.shape, scale.shape, scale.dtype) == ((n, -(-k // 8)), (n, groups), scale_dtype)
    assert (zero is None) == symmetric
    assert (scale > 0).all()
    exact = int4_weight(packed, scale, zero, size, k)
    assert np.array_equal(array(int4.dequantize(packed, scale, zero, size, k, dtype=torch.float64)), exact)
    step = array(scale)[:, np.arange(k) // size]
    slack = 15 * 2.0**-8 if scale_dtype == torch.bfloat16 else 1e-4
    assert (np.abs(exact - array(weight)) <= (0.5 + slack) * step).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_int4_scales_are_as_small_as_the_range_allows(symmetric: bool) -> None:
    """Half a step bounds nothing if steps are too wide: 15 of them must just span the range of each group."""
    weight = torch.randn(16, 128)
    _, scale, _ = int4.quantize(weight, 32, symmetric)
    grouped = array(weight).reshape(16, 4, 32)
    low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    expected = np.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15
    assert np.allclose(array(scale), expected, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_int4_keeps_zero_exactly(symmetric: bool) -> None:
    """Pruned weights stay pruned, also where every other weight of the group is positive."""
    weight = torch.rand(8, 64) + 0.5
    weight[:, ::3] = 0
    packed, scale, zero = int4.quantize(weight, 32, symmetric)
    assert (int4.dequantize(packed, scale, zero, 32, 64)[:, ::3] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@properties
@given(weight=weights(smallest=1), group_size=group_sizes)
def test_mse_is_never_worse_than_minmax_in_int4(symmetric: bool, weight: torch.Tensor, group_size: int | None) -> None:
    k = weight.shape[1]
    size = int4.resolve_group_size(k, group_size)
    error = {}
    for search in ranges.RANGE_SEARCHES:
        packed, scale, zero = int4.quantize(weight, group_size, symmetric, search)
        squares = (int4_weight(packed, scale, zero, size, k) - array(weight)) ** 2
        error[search] = np.add.reduceat(squares, np.arange(0, k, size), axis=1)
    assert (error["mse"] <= error["minmax"] * (1 + 1e-5)).all()


@properties
@given(weight=weights(smallest=1))
def test_mse_is_never_worse_than_minmax_in_int8(weight: torch.Tensor) -> None:
    error = {}
    for search in ranges.RANGE_SEARCHES:
        q, scale = int8.quantize(weight, search)
        error[search] = ((array(q) * array(scale)[:, None] - array(weight)) ** 2).sum(1)
    assert (error["mse"] <= error["minmax"] * (1 + 1e-5)).all()


def test_mse_gains_where_one_value_sticks_out() -> None:
    weight = torch.randn(4, 128)
    weight[:, 5] = 5.0
    error = []
    for search in ("minmax", "mse"):
        packed, scale, zero = int4.quantize(weight, 128, True, search)
        error.append(float(((int4.dequantize(packed, scale, zero, 128, 128) - weight) ** 2).sum()))
    assert error[1] < 0.95 * error[0]


def test_importance_moves_the_error_to_the_channels_that_matter_less() -> None:
    weight = torch.randn(32, 128)
    importance = torch.ones(128)
    importance[:64] = 100.0
    weighted = []
    for given_importance in (None, importance):
        packed, scale, zero = int4.quantize(weight, 128, True, "mse", importance=given_importance)
        squares = (int4.dequantize(packed, scale, zero, 128, 128) - weight) ** 2
        weighted.append(float((squares * importance).sum()))
    assert weighted[1] < weighted[0]


# ---- special values
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("value", [0.0, 0.37, -2.5])
def test_a_group_of_equal_values(value: float, symmetric: bool) -> None:
    weight = torch.full((3, 40), value)
    packed, scale, zero = int4.quantize(weight, 32, symmetric)
    back = int4.dequantize(packed, scale, zero, 32, 40)
    assert torch.isfinite(back).all()
    # Symmetric int4 puts the end of the range half way between two levels, 7.5 steps from zero.
    assert torch.allclose(back, weight, rtol=0.5 / 7.5 + 1e-6 if symmetric else 1e-6)


def test_one_huge_value_costs_its_own_group_only() -> None:
    weight = torch.randn(2, 96)
    alone = int4.dequantize(*int4.quantize(weight, 32), 32, 96)
    weight[0, 40] = 1e30
    back = int4.dequantize(*int4.quantize(weight, 32), 32, 96)
    untouched = torch.ones(2, 96, dtype=torch.bool)
    untouched[0, 32:64] = False
    assert torch.equal(back[untouched], alone[untouched])
    assert abs(back[0, 40].item() / 1e30 - 1) <= 0.5 / 7.5 + 1e-6


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_empty_and_single_element_weights(shape: tuple[int, int], symmetric: bool) -> None:
    weight = torch.randn(shape)
    q, scale = int8.quantize(weight, "mse")
    assert int8.dequantize(q, scale).shape == shape
    size = int4.resolve_group_size(shape[1], 128)
    packed, scale4, zero = int4.quantize(weight, 128, symmetric, "mse")
    assert int4.dequantize(packed, scale4, zero, size, shape[1]).shape == shape


def test_a_group_size_beyond_the_row_is_the_whole_row() -> None:
    weight = torch.randn(4, 48)
    for group_size in (48, 128, -1, None):
        assert all(map(torch.equal, int4.quantize(weight, group_size)[:2], int4.quantize(weight, 48)[:2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_other_float_dtypes_quantise_as_their_float32_values(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 64).to(dtype)
    assert all(map(torch.equal, int8.quantize(weight), int8.quantize(weight.float())))
    assert all(map(torch.equal, int4.quantize(weight, 32)[:2], int4.quantize(weight.float(), 32)[:2]))


def test_strided_weights_quantise_as_contiguous_ones() -> None:
    weight = torch.randn(64, 24).t()
    assert all(map(torch.equal, int8.quantize(weight), int8.quantize(weight.contiguous())))
    assert all(map(torch.equal, int4.quantize(weight, 32)[:2], int4.quantize(weight.contiguous(), 32)[:2]))


@pytest.mark.parametrize("search", ranges.RANGE_SEARCHES)
@pytest.mark.parametrize("elements", [1, 64, 1000])
def test_blocks_of_rows_do_not_change_a_result(search: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 100)
    whole8, whole4 = int8.quantize(weight, search), int4.quantize(weight, 32, False, search)

    def small_blocks(w: torch.Tensor) -> list[torch.Tensor]:
        return list(ranges.row_blocks(w, elements))

    assert len(small_blocks(weight)) > 1
    monkeypatch.setattr(int8, "row_blocks", small_blocks)
    monkeypatch.setattr(int4, "row_blocks", small_blocks)
    assert all(map(torch.equal, int8.quantize(weight, search), whole8))
    assert all(map(torch.equal, int4.quantize(weight, 32, False, search), whole4))


# ---- bad input
@pytest.mark.parametrize("quantize", [int8.quantize, int4.quantize], ids=["int8", "int4"])
@pytest.mark.parametrize(
    "weight, error, words",
    [
        pytest.param(torch.tensor([[1.0, torch.nan]]), ValueError, "finite", id="nan"),
        pytest.param(torch.tensor([[1.0, -torch.inf]]), ValueError, "finite", id="inf"),
        pytest.param(torch.ones(2, 2, dtype=torch.int32), TypeError, "must be float, not torch.int32", id="int"),
        pytest.param(torch.ones(4), ValueError, r"matrix \[N, K\], not of shape \(4,\)", id="1d"),
        pytest.param(torch.ones(2, 2, 2), ValueError, "matrix", id="3d"),
        pytest.param(torch.ones(2, 2, device="meta"), ValueError, "meta", id="meta"),
    ],
)
def test_a_weight_that_cannot_be_quantised(
    quantize: object, weight: torch.Tensor, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        quantize(weight)  # type: ignore[operator]


@pytest.mark.parametrize("group_size", [0, -2])
def test_a_group_size_that_is_no_size(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"group_size must be positive.*not {group_size}"):
        int4.quantize(torch.ones(2, 2), group_size)


def test_an_unknown_range_search_is_named() -> None:
    for quantize in (int8.quantize, lambda w, range_search: int4.quantize(w, range_search=range_search)):
        with pytest.raises(ValueError, match="'median' is unknown.*minmax, mse"):
            quantize(torch.ones(2, 2), range_search="median")


def test_scales_that_overflow_their_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="overflow torch.float16"):
        int4.quantize(torch.full((1, 32), 1e6), 32, scale_dtype=torch.float16)


@pytest.mark.parametrize(
    "importance, words",
    [(torch.ones(3), "shape"), (torch.tensor([1.0, -1.0]), "non-negative"), (torch.tensor([1.0, torch.nan]), "finite")],
    ids=["length", "negative", "nan"],
)
def test_importance_that_makes_no_sense(importance: torch.Tensor, words: str) -> None:
    for quantize in (int8.quantize, int4.quantize):
        with pytest.raises(ValueError, match=words):
            quantize(torch.ones(4, 2), range_search="mse", importance=importance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 37, 1000])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, value: float, at: int) -> None:
    values = torch.randn(7, 143).to(dtype)
    assert ranges.all_finite(values)
    assert ranges.all_finite(torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype))
    assert ranges.all_finite(values[:0])
    values.view(-1)[at] = value
    assert not ranges.all_finite(values)
    assert not ranges.all_finite(values.t())


@pytest.mark.parametrize("shape", [(3, 5), (300, 5000)])
def test_what_is_stored_is_contiguous_whatever_the_float_weight_was(shape: tuple[int, int]):
    weight = torch.randn(shape[::-1]).t()
    for stored in (*int8.quantize(weight), *int4.quantize(weight, 32, symmetric=False)):
        assert stored.is_contiguous()
