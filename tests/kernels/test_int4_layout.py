from __future__ import annotations

import pytest
import torch

from tilewright.kernels.formats import int4
from tilewright.kernels.triton import spans as layout


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("k", [1, 7, 31, 32, 100, 128, 129, 300, 512])
@pytest.mark.parametrize("n", [1, 5, 64])
def test_packing_and_unpacking_give_the_values_back(n, k):
    values = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    words = layout.pack_words(int4.pack(values), k)
    assert words.dtype == torch.int16
    assert words.shape == (n, 32 * layout.span_count(k))
    assert torch.equal(layout.unpack_words(words, k), values)


def test_a_word_holds_one_column_of_each_quarter():
    values = torch.randint(0, 16, (3, 256), dtype=torch.uint8)
    words = layout.pack_words(int4.pack(values), 256).to(torch.int32) & 0xFFFF
    for span, i, j in [(0, 0, 0), (0, 31, 3), (1, 5, 1), (1, 17, 2)]:
        expected = values[:, 128 * span + 32 * j + i].to(torch.int32)
        assert torch.equal((words[:, 32 * span + i] >> (4 * j)) & 15, expected)


def test_padding_holds_zeros():
    values = torch.full((2, 130), 15, dtype=torch.uint8)
    words = layout.pack_words(int4.pack(values), 130)
    assert int(layout.unpack_words(words, 256)[:, 130:].max()) == 0


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k, group_size", [(300, 32), (320, 64), (128, 128), (100, 128), (400, 96), (77, 77)])
def test_scales_and_zeros_lie_group_by_group_and_cover_the_padding(k, group_size, symmetric, scale_dtype):
    n = 11
    weight_packed, scale, zero = int4.quantize(torch.randn(n, k), group_size, symmetric, scale_dtype=scale_dtype)
    weight = layout.kernel_order(weight_packed, scale, zero, group_size, k)
    groups = scale.shape[1]
    assert (weight.scale_dtype, weight.symmetric) == (scale_dtype, symmetric)
    zeros = torch.full((groups, n), 8) if symmetric else int4.unpack_zero(zero, n).t()
    if scale_dtype == torch.float32:
        assert weight.scale.dtype == torch.float32
        assert torch.equal(weight.scale[:groups], scale.t())
        assert not weight.scale[groups:].any()
        assert (weight.zero is None) == symmetric
        found = zeros if symmetric else weight.zero[:groups]
    else:
        assert weight.scale.dtype == torch.int32
        assert weight.zero is None
        bits = weight.scale >> 16
        assert torch.equal(bits[:groups].to(torch.int16).view(scale_dtype), scale.t())
        assert not bits[groups:].any()
        found = weight.scale[:groups] & 15
    assert torch.equal(found.long(), zeros.long())
    covered = 1 if weight.quarters_per_group is None else len(weight.scale) * weight.quarters_per_group
    assert covered >= (1 if weight.quarters_per_group is None else 4 * layout.span_count(k))


@pytest.mark.parametrize("k", [0, 1])
def test_one_row_or_no_columns(k):
    weight_packed, scale, zero = int4.quantize(torch.randn(1, k), None, False)
    weight = layout.kernel_order(weight_packed, scale, zero, 1, k)
    assert weight.weight.shape == (1, 32 * k)
    assert weight.scale.shape == weight.zero.shape == (1, 1)


@pytest.mark.parametrize("k, group_size", [(100, 40), (64, 16), (1000, 48)])
def test_groups_that_cut_a_quarter_are_refused_in_words(k, group_size):
    assert f"groups of {group_size} columns" in layout.why_no_spans(k, group_size)
    weight_packed, scale, zero = int4.quantize(torch.randn(2, k), group_size)
    with pytest.raises(ValueError, match=f"groups of {group_size} columns"):
        layout.kernel_order(weight_packed, scale, zero, group_size, k)


@pytest.mark.parametrize("k, group_size, quarters", [(256, 32, 1), (256, 96, 3), (512, 128, 4), (256, 256, None)])
def test_length_of_a_group_in_quarters(k, group_size, quarters):
    assert layout.quarters_per_group(k, group_size) == quarters


def test_a_weight_is_repacked_once_until_it_is_written():
    weight_packed, scale, zero = int4.quantize(torch.randn(4, 256), 64, symmetric=False)
    first = layout.kernel_order(weight_packed, scale, zero, 64, 256)
    again = layout.kernel_order(weight_packed, scale, zero, 64, 256)
    assert again.weight is first.weight
    assert again.scale is first.scale
    assert again.zero is first.zero
    scale.mul_(2)
    rescaled = layout.kernel_order(weight_packed, scale, zero, 64, 256)
    assert rescaled.weight is first.weight
    assert torch.equal(rescaled.scale, 2 * first.scale)


@pytest.mark.parametrize("n", [1, 3])
def test_the_kernels_copy_shares_no_memory_with_the_canonical_tensors(n):
    weight_packed, scale, zero = int4.quantize(torch.randn(n, 64), None, symmetric=False)
    weight = layout.kernel_order(weight_packed, scale, zero, 64, 64)
    canonical = {t.untyped_storage().data_ptr() for t in (weight_packed, scale, zero)}
    assert canonical.isdisjoint(t.untyped_storage().data_ptr() for t in (weight.weight, weight.scale, weight.zero))
