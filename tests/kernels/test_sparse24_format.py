"""The 2:4 format against its definition, written a second time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.exact import dense_of_24
from tilewright.kernels.formats import int4, sparse24

properties = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


@st.composite
def pruned(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A random weight of any size and dtype, and a mask that keeps two of four, or fewer."""
    n, k = draw(st.integers(0, 20)), draw(st.integers(0, 70))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    weight = torch.randint(-127, 128, (n, k), generator=g).to(dtype)
    mask = sparse24.best_mask(torch.rand(n, k, generator=g))
    if draw(st.booleans()):
        mask &= torch.rand(n, k, generator=g) < 0.7
    return weight, mask


@properties
@given(given_=pruned())
def test_pack_is_undone_by_unpack(given_: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, mask = given_
    n, k = weight.shape
    values, meta = sparse24.pack(weight, mask)
    expected = torch.where(mask, weight, torch.zeros_like(weight))
    assert (values.shape, values.dtype) == ((n, 2 * -(-k // 4)), weight.dtype)
    assert (meta.shape, meta.dtype) == ((n, sparse24.meta_count(k)), torch.uint8)
    assert sparse24.why_bad_meta(meta, k) is None
    assert torch.equal(sparse24.unpack(values, meta, k), expected)
    assert np.array_equal(dense_of_24(values.float().numpy(), meta, k), expected.float().numpy())
    again = sparse24.pack(expected)
    assert torch.equal(sparse24.unpack(*again, k), expected)
    kept = sparse24.mask_of(meta, k)
    assert not (mask & ~kept).any()
    assert sparse24.why_not_24(kept) is None


def test_the_nibble_names_the_places_low_one_first() -> None:
    weight = torch.tensor([[0.0, 5, 0, 7, 1, 2, 0, 0, 0, 0, 3, 4]])
    values, meta = sparse24.pack(weight)
    assert values.tolist() == [[5, 7, 1, 2, 3, 4]]
    assert meta.tolist() == [[(1 | 3 << 2) | (0 | 1 << 2) << 4, 2 | 3 << 2]]


def test_groups_that_keep_less_are_filled_with_zeros_in_order() -> None:
    values, meta = sparse24.pack(torch.tensor([[0.0, 0, 0, 9, 0, 0, 0, 0, 0, 8, 0]]))
    assert values.tolist() == [[0, 9, 0, 0, 0, 8]]
    assert meta.tolist() == [[(0 | 3 << 2) | (0 | 1 << 2) << 4, 0 | 1 << 2]]


def test_what_a_mask_drops_may_be_anything() -> None:
    weight = torch.tensor([[torch.nan, 1.0, -torch.inf, 2.0]])
    values, meta = sparse24.pack(weight, torch.tensor([[False, True, False, True]]))
    assert sparse24.unpack(values, meta, 4).tolist() == [[0.0, 1.0, 0.0, 2.0]]


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_any_strides(layout: str) -> None:
    weight = torch.randn(12, 24)
    weight *= sparse24.best_mask(weight.abs())
    other = weight.t().contiguous().t() if layout == "transposed" else weight.repeat(1, 2)[:, :24]
    assert all(map(torch.equal, sparse24.pack(other), sparse24.pack(weight)))


@pytest.mark.parametrize("k", [8, 100, 256])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [4, 32, None])
def test_int4_values_share_the_groups_of_their_columns(k: int, symmetric: bool, group_size: int | None) -> None:
    size = int4.resolve_group_size(k, group_size)
    kept = sparse24.kept_group_size(k, size)
    weight = torch.randn(9, k)
    values, meta = sparse24.pack(weight, sparse24.best_mask(weight.abs()))
    packed, scale, zero = int4.quantize(values, kept, symmetric)
    assert scale.shape[1] == -(-k // size)
    dense = int4.dequantize(sparse24.unpack_int4(packed, meta, zero, size, k), scale, zero, size, k)
    expected = sparse24.unpack(int4.dequantize(packed, scale, zero, kept, values.shape[1]), meta, k)
    assert torch.equal(dense, expected)


def test_a_weight_that_is_not_2_4_is_refused_with_the_place() -> None:
    weight = torch.zeros(3, 12)
    weight[1, 4:7] = 1
    with pytest.raises(
        ValueError, match=r"not 2:4: row 1 keeps 3 of the columns 4 to 7; 1 of 9 groups .*prune it first"
    ):
        sparse24.pack(weight)
    with pytest.raises(ValueError, match="the mask is not 2:4: row 1 keeps 3"):
        sparse24.pack(weight, weight != 0)
    with pytest.raises(TypeError, match="a 2:4 mask must be bool, not torch.float32"):
        sparse24.pack(weight, weight)
    with pytest.raises(ValueError, match=r"a mask of shape \[1, 12\] does not fit a weight of shape \[3, 12\]"):
        sparse24.pack(weight, weight[:1] != 0)
    with pytest.raises(ValueError, match=r"must be a matrix \[N, K\], not of shape \[4\]"):
        sparse24.pack(torch.zeros(4))
    with pytest.raises(ValueError, match="meta device"):
        sparse24.pack(torch.zeros(4, 4, device="meta"))
    with pytest.raises(ValueError, match="groups of 6 columns are neither"):
        sparse24.kept_group_size(64, 6)


def test_places_that_do_not_ascend_are_found() -> None:
    good = sparse24.pack(torch.randn(2, 20), torch.eye(2, 20, dtype=torch.bool))[1]
    assert sparse24.why_bad_meta(good, 20) is None
    bad = good.clone()
    bad[1, 1] = 0b0001_0100
    assert "row 1 keeps the places 1 and 0 of group 3" in str(sparse24.why_bad_meta(bad, 20))
    bad = good.clone()
    bad[0, 2] |= 0x40
    assert "after the last group" in str(sparse24.why_bad_meta(bad, 20))
    for low in range(16):
        assert (sparse24.why_bad_meta(torch.tensor([[low]], dtype=torch.uint8), 4) is None) == (low in sparse24.VALID)
