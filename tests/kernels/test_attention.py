"""Attention: the definition against PyTorch, the C kernel against float64 on every instruction set, who is served.

Every test here runs under the sanitizers too; what makes PyTorch throw, which they cannot follow, is in
``test_attention_ops``.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tolerance import assert_close_as_plain
from tilewright.kernels.attention import cpu, pytorch, reference
from tilewright.kernels.cpu import attention, native
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import route

quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MASKS = ("none", "bool", "padding", "float", "one key", "2-d")


@pytest.fixture
def vector_isa(isa: str) -> str:
    if not native.function("conv_lanes")():
        pytest.skip(f"needs vectors, which {isa} has not")
    return isa


def operands(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int, value_width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As a model makes them: views of [batch, length, heads * width]."""

    def view(heads: int, length: int, width: int) -> torch.Tensor:
        return torch.randn(batch, length, heads * width).view(batch, length, heads, width).transpose(1, 2)

    return view(heads, queries, width), view(kv_heads, keys, width), view(kv_heads, keys, value_width)


def mask_of(kind: str, batch: int, heads: int, queries: int, keys: int) -> torch.Tensor | None:
    if kind == "bool":
        return torch.rand(batch, heads, queries, keys) > 0.4
    if kind == "padding":
        return (torch.rand(batch, 1, 1, keys) > 0.4).expand(batch, 1, queries, keys)
    if kind == "float":
        return torch.randn(batch, 1, queries, keys)
    if kind == "one key":
        return torch.rand(batch, heads, queries, 1) > 0.2
    return torch.randn(keys, queries).t() if kind == "2-d" else None


def double(mask: torch.Tensor | None) -> torch.Tensor | None:
    return mask if mask is None or mask.dtype == torch.bool else mask.double()


@quick
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries=st.integers(1, 40),
    keys=st.integers(1, 90),
    width=st.integers(1, 70),
    value_width=st.integers(1, 140),
    mask=st.sampled_from((*MASKS, "causal")),
    scale=st.sampled_from((None, 0.3, 0.0, -0.3)),
    seed=st.integers(0, 1000),
)
def test_agrees_with_float64(
    vector_isa: str,
    batch: int,
    kv_heads: int,
    groups: int,
    queries: int,
    keys: int,
    width: int,
    value_width: int,
    mask: str,
    scale: float | None,
    seed: int,
):
    torch.manual_seed(seed)
    heads = kv_heads * groups
    if batch * heads * queries * value_width < 256:  # among few elements the plain expression may happen to be exact
        batch = -(-256 // (heads * queries * value_width))
    q, k, v = operands(batch, heads, kv_heads, queries, keys, width, value_width)
    added = mask_of(mask, batch, heads, queries, keys)
    options = (mask == "causal", scale)
    exact = reference.attention(q.double(), k.double(), v.double(), double(added), *options)
    assert_close_as_plain(cpu.attention(q, k, v, added, *options), reference.attention(q, k, v, added, *options), exact)


@pytest.mark.parametrize("mask", MASKS)
def test_the_definition_is_pytorchs(mask: str):
    q, k, v = (t.double() for t in operands(2, 4, 2, 7, 9, 16, 24))
    added = double(mask_of(mask, 2, 4, 7, 9))
    assert torch.allclose(reference.attention(q, k, v, added), pytorch.attention(q, k, v, added), atol=1e-12)
    theirs = F.scaled_dot_product_attention(q, k, v, added, enable_gqa=True)
    assert torch.allclose(reference.attention(q, k, v, added), theirs, atol=1e-12)


def test_causal_is_pytorchs():
    q, k, v = (t.double() for t in operands(1, 2, 2, 6, 9, 8, 8))
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)
    assert torch.allclose(reference.attention(q, k, v, causal=True, scale=0.2), theirs, atol=1e-12)


@pytest.mark.parametrize("keys", [8, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_causal_with_a_scale_of_zero_or_less(scale: float, dtype: torch.dtype, keys: int):
    q, k, v = (t.to(dtype) for t in operands(1, 4, 2, 8, keys, 16, 16))
    expected = reference.attention(q, k, v, causal=True, scale=scale)
    atol = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(pytorch.attention(q, k, v, causal=True, scale=scale), expected, atol=atol)


def test_a_query_that_sees_nothing_gives_zeros(vector_isa: str):
    q, k, v = operands(1, 2, 2, 8, 20, 16, 16)
    seen = torch.ones(1, 1, 8, 20, dtype=torch.bool)
    seen[:, :, 3] = False
    for mask in (seen, torch.zeros(1, 1, 8, 20).masked_fill(~seen, -math.inf)):
        for y in (cpu.attention(q, k, v, mask), reference.attention(q, k, v, mask)):
            assert torch.equal(y[:, :, 3], torch.zeros_like(y[:, :, 3]))
            assert torch.isfinite(y).all()
    lowest = torch.full((1, 1, 8, 20), torch.finfo(torch.float32).min)  # the same for all keys: their mean
    assert torch.allclose(cpu.attention(q, k, v, lowest), v.mean(2, keepdim=True).expand(1, 2, 8, 16), atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_query_stays_alone(vector_isa: str, bad: float):
    q, k, v = operands(2, 2, 2, 9, 21, 16, 16)
    clean = cpu.attention(q, k, v)
    q[1, 0, 4, 3] = bad
    y = cpu.attention(q, k, v)
    assert torch.isnan(y[1, 0, 4]).all()
    y[1, 0, 4] = clean[1, 0, 4]
    assert torch.equal(y, clean)


def test_masked_keys_may_hold_anything_but_values(vector_isa: str):
    q, k, v = operands(1, 2, 2, 9, 21, 16, 16)
    seen = torch.ones(1, 1, 9, 21, dtype=torch.bool)
    seen[..., 15:] = False
    expected = cpu.attention(q, k, v, seen)
    k[:, :, 15:] = 1e30
    assert torch.equal(cpu.attention(q, k, v, seen), expected)


def test_depends_neither_on_the_batch_nor_on_threads(vector_isa: str):
    q, k, v = operands(17, 3, 3, 13, 37, 24, 24)
    together = cpu.attention(q, k, v)
    for i in (0, 9, 16):
        one = slice(i, i + 1)
        assert torch.equal(cpu.attention(q[one], k[one], v[one]), together[one])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(cpu.attention(q, k, v), together)
    finally:
        torch.set_num_threads(threads)


def test_more_queries_than_one_block(vector_isa: str):
    q, k, v = operands(1, 1, 1, 300, 300, 8, 8)
    exact = reference.attention(q.double(), k.double(), v.double(), causal=True)
    assert_close_as_plain(cpu.attention(q, k, v, causal=True), reference.attention(q, k, v, causal=True), exact)


# ---- sinks
@pytest.mark.parametrize("mask", [*MASKS, "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pytorchs_with_sinks_is_the_definition(mask: str, dtype: torch.dtype):
    q, k, v = (t.to(dtype) for t in operands(2, 4, 2, 7, 9, 16, 24))
    for sinks in (torch.randn(4), torch.randn(2, 4)):
        given = (mask_of(mask, 2, 4, 7, 9), mask == "causal", -0.3, sinks)
        expected = reference.attention(q, k, v, *given)
        assert not torch.allclose(reference.attention(q, k, v, *given[:3]), expected, atol=1e-2)
        atol = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float64: 1e-6}[dtype]
        assert torch.allclose(pytorch.attention(q, k, v, *given), expected, atol=atol)


def test_the_definition_with_sinks_is_a_softmax_of_one_score_more():
    q, k, v = (t.double() for t in operands(2, 3, 3, 5, 6, 8, 8))
    sinks = torch.randn(3, dtype=torch.float64)
    scores = torch.cat((q @ k.mT / 8**0.5, sinks.view(1, 3, 1, 1).expand(2, 3, 5, 1)), dim=-1)
    assert torch.allclose(reference.attention(q, k, v, sinks=sinks), scores.softmax(-1)[..., :-1] @ v, atol=1e-12)


@pytest.mark.parametrize("queries", [1, 3, 4, 5, 40])
@pytest.mark.parametrize("keys", [1, 77, 129, 500])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_sinks_agree_with_float64(vector_isa: str, queries: int, keys: int, mask: str):
    torch.manual_seed(queries * keys)
    q, k, v = operands(2, 6, 2, queries, keys, 24, 40)
    added = mask_of(mask, 2, 6, queries, keys)
    for sinks in (torch.randn(6) * 4, torch.randn(2, 6), torch.full((6,), -math.inf), torch.full((6,), 200.0)):
        given = (added, mask == "causal", None)
        exact = reference.attention(q.double(), k.double(), v.double(), double(added), *given[1:], sinks.double())
        y = cpu.attention(q, k, v, *given, sinks)
        assert_close_as_plain(y, reference.attention(q, k, v, *given, sinks), exact)
        if sinks[0].ravel()[0] == -math.inf:
            assert torch.equal(y, cpu.attention(q, k, v, *given))
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            assert torch.equal(cpu.attention(q, k, v, *given, sinks), y)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("queries, keys", [(2, 20), (3, 400), (9, 20)])
def test_a_bad_sink_spoils_its_head(vector_isa: str, queries: int, keys: int):
    q, k, v = operands(2, 4, 2, queries, keys, 16, 16)
    sinks = torch.randn(4)
    clean = cpu.attention(q, k, v, sinks=sinks)
    sinks[2] = math.nan
    y = cpu.attention(q, k, v, sinks=sinks)
    assert torch.isnan(y[:, 2]).all()
    y[:, 2] = clean[:, 2]
    assert torch.equal(y, clean)
    nothing = torch.zeros(1, 1, 1, keys, dtype=torch.bool)
    assert not cpu.attention(q, k, v, nothing, sinks=torch.randn(4)).any(), "the sink takes all"


# ---- few queries
@quick
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 5),
    queries=st.integers(1, 4),
    keys=st.sampled_from((1, 7, 127, 128, 129, 256, 300, 515, 1100)),
    width=st.sampled_from((8, 16, 30, 64, 80, 128)),
    value_width=st.sampled_from((8, 24, 64, 128, 133)),
    mask=st.sampled_from((*MASKS, "causal")),
    seed=st.integers(0, 1000),
)
def test_few_queries_agree_with_float64(
    vector_isa: str,
    batch: int,
    kv_heads: int,
    groups: int,
    queries: int,
    keys: int,
    width: int,
    value_width: int,
    mask: str,
    seed: int,
):
    torch.manual_seed(seed)
    heads = kv_heads * groups
    if batch * heads * queries * value_width < 256:  # as above
        batch = -(-256 // (heads * queries * value_width))
    q, k, v = operands(batch, heads, kv_heads, queries, keys, width, value_width)
    added = mask_of(mask, batch, heads, queries, keys)
    causal = mask == "causal"
    exact = reference.attention(q.double(), k.double(), v.double(), double(added), causal)
    y = cpu.attention(q, k, v, added, causal)
    assert_close_as_plain(y, reference.attention(q, k, v, added, causal), exact)
    lonely = cpu.attention(*(t[:1] for t in (q, k, v)), None if added is None or added.dim() < 4 else added[:1], causal)
    if added is None or added.dim() == 4:
        assert torch.equal(lonely, y[:1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(cpu.attention(q, k, v, added, causal), y)
    finally:
        torch.set_num_threads(threads)


def test_strides_of_a_cache_change_nothing(vector_isa: str):
    q, k, v = operands(2, 6, 2, 1, 400, 64, 64)
    y = cpu.attention(q, k, v)
    room_k, room_v = torch.full((2, 2, 512, 64), math.nan), torch.full((2, 2, 512, 64), math.nan)
    room_k[:, :, 50:450], room_v[:, :, 50:450] = k, v
    assert torch.equal(cpu.attention(q, room_k[:, :, 50:450], room_v[:, :, 50:450]), y)


@pytest.mark.parametrize("keys", [100, 700])
def test_few_queries_that_see_nothing(vector_isa: str, keys: int):
    q, k, v = operands(1, 4, 2, 3, keys, 16, 16)
    seen = torch.ones(1, 1, 3, keys, dtype=torch.bool)
    seen[:, :, 1] = False
    for mask in (seen, torch.zeros(1, 1, 3, keys).masked_fill(~seen, -math.inf)):
        y = cpu.attention(q, k, v, mask)
        assert torch.equal(y[:, :, 1], torch.zeros_like(y[:, :, 1])) and torch.isfinite(y).all()
        assert torch.equal(y[:, :, [0, 2]], cpu.attention(q, k, v)[:, :, [0, 2]])


@pytest.mark.parametrize("keys", [100, 700])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_among_few_queries_stays_alone(vector_isa: str, keys: int, bad: float):
    q, k, v = operands(2, 4, 2, 2, keys, 16, 16)
    clean = cpu.attention(q, k, v)
    q[1, 0, 1, 3] = bad
    y = cpu.attention(q, k, v)
    assert torch.isnan(y[1, 0, 1]).all()
    y[1, 0, 1] = clean[1, 0, 1]
    assert torch.equal(y, clean)
    q[1, 0, 1, 3] = 0.0
    v[0, 1, 40, 2] = math.nan
    y = cpu.attention(q, k, v)
    assert torch.isnan(y[0, 2:, :, 2]).all() and torch.isnan(y).sum() == 4
    k[0, 0, -1, 2] = math.nan
    assert torch.isnan(cpu.attention(q, k, v)[0, :2]).all()


def test_what_a_cache_has_not_been_filled_with_is_not_read(vector_isa: str):
    q, k, v = operands(1, 4, 2, 1, 1000, 32, 32)
    seen = torch.zeros(1, 1, 1, 1000, dtype=torch.bool)
    seen[..., :130] = True
    k[:, :, 256:], v[:, :, 256:] = math.nan, math.nan
    y = cpu.attention(q, k, v, seen)
    expected = reference.attention(*(t[:, :, :130].double() if t is not q else t.double() for t in (q, k, v)))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_few_queries_take_any_number_of_keys(vector_isa: str):
    for queries, keys, served in ((1, 8000, True), (4, 513, True), (5, 513, False), (5, 512, True)):
        problem = Problem("attention", queries, attention.routed_keys(queries, keys), 8, torch.float32)
        assert (route(problem).name == "C kernel") == served


@pytest.mark.parametrize(
    "isa, change, words",
    [
        ("avx2", {"x_dtype": torch.float16}, "float32 and bfloat16"),
        ("avx2", {"n": 513}, "512 keys"),
        ("avx2", {"k": 257}, "width 256"),
        ("avx2", {"m": 0}, "nothing"),
        ("portable", {}, "not built for portable"),
    ],
    indirect=["isa"],
)
def test_declines_in_words(isa: str, change: dict[str, object], words: str):
    problem = Problem(**{"op": "attention", "m": 8, "n": 8, "k": 8, "x_dtype": torch.float32, **change})  # type: ignore[arg-type]
    decision = route(problem)
    assert decision.name == "PyTorch"
    assert words in dict(decision.declined)["C kernel"]
