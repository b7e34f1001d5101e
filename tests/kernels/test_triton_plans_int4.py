"""What the int4 kernels decide on the host: which configuration, how many programs, and what they decline."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from tests.tolerance import assert_close_as_plain
from tilewright.kernels import matrices
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats import int4
from tilewright.kernels.int4_int8_linear import triton_fused as w4a8
from tilewright.kernels.int4_linear import dequantize, reference, triton_dequantize
from tilewright.kernels.int4_linear import triton_fused as w4a16
from tilewright.kernels.triton.spans import SpanWeight, quarters_per_group, span_count

H200 = {"device": "cuda", "capability": (9, 0), "multiprocessors": 132}
B200 = {"device": "cuda", "capability": (10, 0), "multiprocessors": 148}
MI300 = {"device": "cuda", "gpu_arch": "gfx942", "multiprocessors": 304}
BATCHES = (1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 128, 129, 256)
FAMILIES = (range(1, 17), range(17, 65), range(65, 129), range(129, 257))


def problem(op="int4_linear", m=16, n=4096, k=4096, x_dtype=torch.bfloat16, group_size=128, **facts):
    return Problem(op, m=m, n=n, k=k, x_dtype=x_dtype, group_size=group_size, **{**H200, **facts})


def meta_weight(n, k, group_size):
    quarters = quarters_per_group(k, group_size)
    groups = 1 if quarters is None else -(-4 * span_count(k) // quarters)
    words = torch.empty(n, 32 * span_count(k), dtype=torch.int16, device="meta")
    return SpanWeight(words, torch.empty(groups, n, device="meta"), None, quarters, k)


def plan_w4a16(m, n, k, config, group_size=128):
    x, out = (torch.empty(m, columns, dtype=torch.bfloat16, device="meta") for columns in (k, n))
    return w4a16.plan_span_product(
        w4a16.int4_linear_kernel,
        x,
        None,
        meta_weight(n, k, group_size),
        out,
        bias=None,
        residual=None,
        activation="none",
        multiply_dtype=torch.bfloat16,
        config=config,
        inline_ptx=True,
    )


@pytest.mark.parametrize("module", [w4a16, w4a8], ids=["W4A16", "W4A8"])
@pytest.mark.parametrize("n, k", [(384, 384), (4096, 4096), (28672, 4096), (4096, 14336)])
def test_how_k_is_cut_depends_on_the_family_alone(module, n, k):
    config_type = w4a16.FusedConfig if module is w4a16 else w4a8.Int4Int8Config
    splits = {m: config_type.for_problem(problem(m=m, n=n, k=k)).splits for m in BATCHES}
    for family in FAMILIES:
        assert len({splits[m] for m in BATCHES if m in family}) == 1


@pytest.mark.parametrize("facts", [H200, B200, MI300], ids=["H200", "B200", "MI300"])
@pytest.mark.parametrize("m", BATCHES)
def test_the_heuristic_stays_among_the_configs(m, facts):
    for module, config_type in ((w4a16, w4a16.FusedConfig), (w4a8, w4a8.Int4Int8Config)):
        chosen = config_type.for_problem(problem(m=m, **facts))
        listed = {(c.block_n, c.block_m, c.num_warps) for c in module.CONFIGS}
        assert (chosen.block_n, chosen.block_m, chosen.num_warps) in listed


def test_a_ragged_k_has_a_smaller_batch_tile():
    assert w4a8.Int4Int8Config.for_problem(problem(m=256, **B200)).block_m == 128
    assert w4a8.Int4Int8Config.for_problem(problem(m=256, k=4100, **B200)).block_m == 64


def test_a_batch_tile_of_64_has_one_warp_group_on_hopper():
    for module in (w4a16.FusedConfig, w4a8.Int4Int8Config):
        assert module.for_problem(problem(m=64)).num_warps == module.for_problem(problem(m=256)).num_warps == 4
        assert module.for_problem(problem(m=64, **B200)).num_warps == 8


def test_local_memory_limits_the_stages():
    assert w4a16.FusedConfig.for_problem(problem(m=256, capability=None, **MI300)).num_stages == 2
    assert w4a8.Int4Int8Config.for_problem(problem(m=4096, capability=None, **MI300)).num_stages == 2


def test_a_small_batch_fills_the_gpu():
    config = w4a16.FusedConfig.for_problem(problem(m=1))
    (product, _) = plan_w4a16(1, 4096, 4096, config)
    assert 132 <= product.grid[0] * product.grid[1] <= 4 * 132


def test_a_large_batch_of_w4a8_keeps_k_whole():
    assert w4a8.Int4Int8Config.for_problem(problem(m=257, n=128)).splits == 1


@pytest.mark.parametrize("k", [1, 128, 129, 1000, 4096])
@pytest.mark.parametrize("splits", [1, 2, 3, 8])
def test_parts_cover_k_and_none_is_empty(k, splits):
    launches = plan_w4a16(5, 300, k, replace(w4a16.CONFIGS[0], splits=splits))
    product = launches[0]
    spans, each, parts = product.args["spans"], product.args["spans_per_part"], product.grid[1]
    assert spans == span_count(k)
    assert (parts - 1) * each < spans <= parts * each
    assert len(launches) == (1 if parts == 1 else 2)
    if parts > 1:
        assert product.args["workspace_ptr"].shape == (parts, 5, 300)


@pytest.mark.parametrize("m, n", [(1, 1), (16, 128), (17, 129), (256, 4096)])
def test_tiles_cover_the_output(m, n):
    for config in w4a16.CONFIGS:
        product = plan_w4a16(m, n, 512, config)[0]
        assert product.grid[0] == -(-m // config.block_m) * -(-n // config.block_n)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"device": "cpu"}, "GPU"),
        ({"capability": (7, 5)}, "7.5"),
        ({"m": 385}, "up to 384"),
        ({"m": 129, "group_size": 32}, "up to 128"),
        ({"m": 65, "x_dtype": torch.float32}, "up to 64"),
        ({"group_size": 40}, "groups of 40 columns"),
        ({"x_dtype": torch.float64}, "float64"),
        ({"compute_dtype": torch.float64}, "float64"),
    ],
)
def test_w4a16_says_what_it_does_not_take(changes, words):
    assert words in w4a16.why_not(problem(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"m": 384},
        {"m": 128, "group_size": 32},
        {"m": 1, "k": 100, "group_size": 100},
        {"m": 16, "k": 20, "group_size": 20},
        {"m": 256, "x_dtype": torch.float32, "compute_dtype": torch.bfloat16},
        {"m": 0, "n": 0, "k": 0, "group_size": 1},
    ],
)
def test_w4a16_takes(changes):
    assert w4a16.why_not(problem(**changes)) is None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"device": "cpu"}, "GPU"),
        ({"group_size": 16}, "groups of 16 columns"),
        ({"x_dtype": torch.float64}, "float64"),
        ({"k": 2**21, "group_size": 2**21}, "int32"),
    ],
)
def test_w4a8_says_what_it_does_not_take(changes, words):
    assert words in w4a8.why_not(problem("int4_int8_linear", **changes))


def test_w4a8_takes_every_batch():
    assert all(w4a8.why_not(problem("int4_int8_linear", m=m)) is None for m in (*BATCHES, 100_000))


@pytest.mark.parametrize("group_size", [1, 7, 128])
def test_dequantising_takes_every_group_and_batch(group_size):
    assert triton_dequantize.why_not(problem(m=100_000, group_size=group_size)) is None
    assert "GPU" in triton_dequantize.why_not(problem(device="cpu"))


@pytest.mark.parametrize("n, k", [(0, 8), (1, 1), (512, 0), (100_000, 4096), (10, 2**27)])
def test_scratch_is_bounded_and_blocks_of_rows_are_whole(n, k):
    blocks = list(matrices.row_blocks(n, k, torch.bfloat16))
    assert [row for first, last in blocks for row in (first, last)][:1] == ([0] if n else [])
    assert all(before[1] == after[0] for before, after in itertools.pairwise(blocks))
    assert not n or blocks[-1][1] == n
    for first, last in blocks:
        assert first % matrices.ROWS == 0
        assert (last - first) * k * 2 <= matrices.SCRATCH_BYTES or last - first <= matrices.ROWS


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("group_size", [7, 32, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantise_and_multiply_equals_the_reference_on_any_device(monkeypatch, dtype, group_size, activation):
    torch.manual_seed(0)
    monkeypatch.setattr(matrices, "SCRATCH_BYTES", 1)
    n, k = matrices.ROWS + 20, 100
    weight = int4.quantize(torch.randn(n, k), group_size, symmetric=False)
    x, bias, residual = torch.randn(2, 3, k).to(dtype), torch.randn(n), torch.randn(n)
    options = {"group_size": group_size, "bias": bias, "residual": residual, "activation": activation}
    plain = reference.int4_linear(x, *weight, **options)
    exact = reference.int4_linear(x.double(), *weight, **options)
    assert_close_as_plain(dequantize.int4_linear(x, *weight, **options), plain, exact)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (64,), (1,)])
def test_dequantise_and_multiply_of_nothing(shape):
    for n in (0, 5):
        weight = int4.quantize(torch.randn(n, shape[-1]), None)
        x, group_size = torch.randn(shape), max(shape[-1], 1)
        expected = reference.int4_linear(x, *weight, group_size=group_size)
        assert torch.allclose(dequantize.int4_linear(x, *weight, group_size=group_size), expected)
