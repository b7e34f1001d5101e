"""Attention of few queries to the many keys of a cache, on every instruction set: of 8192 keys, and of int8 codes."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from tests.kernels.test_attention import assert_close_as_plain, double, mask_of, operands
from tilewright.kernels.attention import cpu, pytorch, reference
from tilewright.kernels.cpu import native
from tilewright.kernels.cpu.attention import Job, job

KEYS = 8192


@pytest.fixture
def vector_isa(isa: str) -> str:
    if not native.function("conv_lanes")():
        pytest.skip(f"needs vectors, which {isa} has not")
    return isa


def window(queries: int, keys: int, size: int) -> torch.Tensor:
    """What the last queries of a sequence see of it."""
    at = torch.arange(keys - queries, keys)[:, None]
    key = torch.arange(keys)
    return ((key <= at) & (key > at - size))[None, None]


@pytest.mark.parametrize("queries", [1, 2, 4])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (8, 2), (7, 1)])
@pytest.mark.parametrize("sees", ["all", "what was before", "a window", "the first ones"])
def test_of_8192_keys(vector_isa: str, queries: int, heads: int, kv_heads: int, sees: str) -> None:
    torch.manual_seed(0)
    q, k, v = operands(1, heads, kv_heads, queries, KEYS, 64, 64)
    masks = {"what was before": window(queries, KEYS, KEYS), "a window": window(queries, KEYS, 1000)}
    given = (masks.get(sees), sees == "the first ones")
    y, exact = cpu.attention(q, k, v, *given), reference.attention(q.double(), k.double(), v.double(), *given)
    assert_close_as_plain(y, reference.attention(q, k, v, *given), exact)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(cpu.attention(q, k, v, *given), y)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 128), (1, 700), (3, 130), (4, 1100), (1, KEYS)])
@pytest.mark.parametrize("heads, kv_heads, widths", [(2, 2, (64, 64)), (8, 2, (30, 133)), (7, 1, (128, 24))])
@pytest.mark.parametrize("kind", ["none", "bool", "bfloat16", "causal", "sinks"])
def test_of_bfloat16(
    vector_isa: str, queries: int, keys: int, heads: int, kv_heads: int, widths: tuple[int, int], kind: str
) -> None:
    """The result of float32 sums of the numbers as they are, rounded once; the same on any number of threads."""
    torch.manual_seed(keys)
    q, k, v = (t.bfloat16() for t in operands(2, heads, kv_heads, queries, keys, *widths))
    mask = mask_of({"bool": "bool", "bfloat16": "float"}.get(kind, "none"), 2, heads, queries, keys)
    if kind == "bfloat16" and mask is not None:
        mask = mask.bfloat16()
    sinks = torch.randn(heads).bfloat16() if kind == "sinks" else None
    given = (mask, kind == "causal", None, sinks)
    y = cpu.attention(q, k, v, *given)
    assert y.dtype == torch.bfloat16
    wide = cpu.attention(q.float(), k.float(), v.float(), *given)
    assert torch.equal(y, wide.bfloat16()), "the same sums as of the same numbers in float32"
    exact = reference.attention(q.double(), k.double(), v.double(), double(mask), *given[1:])
    assert (y.double() - exact).abs().max() <= (exact.abs().max() + 1e-3) * 2**-8
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(cpu.attention(q, k, v, *given), y)
    finally:
        torch.set_num_threads(threads)


def test_more_queries_of_bfloat16_are_pytorchs(vector_isa: str) -> None:
    q, k, v = (t.bfloat16() for t in operands(2, 4, 2, 5, 9, 16, 24))
    sinks = torch.randn(4)
    assert torch.equal(cpu.attention(q, k, v, sinks=sinks), pytorch.attention(q, k, v, sinks=sinks))
    assert torch.equal(cpu.attention(q, k, v, causal=True), pytorch.attention(q, k, v, causal=True))


@pytest.mark.parametrize("keys", [3, 300])
def test_what_is_not_finite_in_bfloat16(vector_isa: str, keys: int) -> None:
    q, k, v = (t.bfloat16() for t in operands(1, 4, 2, 1, keys, 16, 16))
    v[0, 1, 1, 2], v[0, 0, 2, 5] = math.nan, math.inf
    y = cpu.attention(q, k, v)
    assert torch.isnan(y[0, 2:, :, 2]).all() and (y[0, :2, :, 5] == math.inf).all()
    assert torch.isfinite(y).sum() == y.numel() - 4
    nothing = torch.zeros(1, 1, 1, keys, dtype=torch.bool)
    assert not cpu.attention(q, k, v.nan_to_num(0, 0, 0), nothing).any()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("queries, length", [(1, 5), (4, 130), (2, 700)])
def test_what_is_new_in_bfloat16_is_written_to_the_bit(
    vector_isa: str, threads: int, queries: int, length: int
) -> None:
    q, k, v = (t.bfloat16() for t in operands(2, 6, 2, queries, length, 30, 24))
    k[0, 0, -1, 3] = math.nan
    room_k, room_v = torch.zeros(2, 2, length + 9, 30).bfloat16(), torch.zeros(2, 2, length + 9, 24).bfloat16()
    before = length - queries
    held_k, held_v = room_k[:, :, :length], room_v[:, :, :length]
    held_k[:, :, :before], held_v[:, :, :before] = k[:, :, :before], v[:, :, :before]
    new_k, new_v = k[:, :, before:], v[:, :, before:]
    y = torch.full((2, queries, 6, 24), math.nan, dtype=torch.bfloat16)
    described = job(q, held_k, held_v, None, False, 0.125, y, threads)
    described.new_k, described.new_v = new_k.data_ptr(), new_v.data_ptr()
    described.new_k_stride, described.new_v_stride = new_k.stride()[:3], new_v.stride()[:3]
    described.new_first, described.new_count = before, queries
    found = attended(described, y, 4)
    assert torch.equal(held_k.view(torch.int16), k.view(torch.int16)) and torch.equal(held_v, v)
    assert not room_k[:, :, length:].any() and not room_v[:, :, length:].any()
    assert torch.equal(found.nan_to_num(7), cpu.attention(q, k, v, scale=0.125).nan_to_num(7))


def attended(job: Job, y: torch.Tensor, batch_heads: int) -> torch.Tensor:
    """The result of a description that lacks its scratch memory."""
    floats = native.function("attention_scratch")(ctypes.addressof(job))
    scratch, done = torch.full((max(floats, 1),), math.nan), torch.empty(batch_heads, dtype=torch.int32)
    job.scratch, job.done = scratch.data_ptr(), done.data_ptr()
    native.function("attention")(ctypes.addressof(job))
    return y.transpose(1, 2)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "heads, kv_heads, queries, length, widths",
    [
        (2, 2, 1, 5, (64, 64)),
        (8, 2, 1, 700, (64, 64)),
        (4, 2, 4, 130, (30, 133)),
        (3, 1, 2, 129, (128, 24)),
        (7, 1, 1, KEYS, (64, 64)),
    ],
)
def test_of_codes_is_that_of_the_numbers_they_stand_for(
    vector_isa: str, threads: int, heads: int, kv_heads: int, queries: int, length: int, widths: tuple[int, int]
) -> None:
    """To the bit, on every instruction set; new positions become the codes that the cache itself makes of them."""
    pytest.importorskip("transformers", reason="needs transformers")
    from tilewright.convert.graph.int8_cache import Int8Layer

    torch.manual_seed(0)
    q, k, v = operands(2, heads, kv_heads, queries, length, *widths)
    k[0, 0, -1], v[1, 0, -1] = k[0, 0, -1] * 1e-42, 0
    k[1, 0, -1, 3] = math.nan if queries == 1 else 1.0
    mine, theirs = Int8Layer(), Int8Layer()
    before = length - queries
    for layer in (mine, theirs):
        layer.update(k[:, :, :before], v[:, :, :before])
    new_k, new_v = k[:, :, before:], v[:, :, before:]
    numbers = theirs.update(new_k, new_v)
    room = mine.room(queries)
    y = torch.full((2, queries, heads, widths[1]), math.nan)
    described = job(q, room.keys, room.values, None, False, 0.125, y, threads)
    described.new_k, described.new_v = new_k.data_ptr(), new_v.data_ptr()
    described.new_k_stride, described.new_v_stride = new_k.stride()[:3], new_v.stride()[:3]
    described.new_first, described.new_count = room.first, queries
    described.k_scale, described.v_scale = room.key_scales.data_ptr(), room.value_scales.data_ptr()
    described.k_scale_stride, described.v_scale_stride = room.key_scales.stride()[:2], room.value_scales.stride()[:2]
    described.errors, described.errors_stride = room.errors.data_ptr(), room.errors.stride()[:2]
    found = attended(described, y, 2 * kv_heads)
    for held, wanted in zip((mine.keys, mine.values), numbers, strict=True):
        assert held is not None and torch.equal(held.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))
    expected = torch.full_like(y, math.nan)
    expected = attended(job(q, *numbers, None, False, 0.125, expected, threads), expected, 2 * kv_heads)
    assert torch.equal(found.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert mine.error == pytest.approx(theirs.error, abs=1e-3, nan_ok=True)
    if queries > 1:
        exact = reference.attention(q.double(), k.double(), v.double(), scale=0.125)
        assert (found - exact).norm() < 0.02 * exact.norm()
