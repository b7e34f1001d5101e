"""What the int8 launchers plan: configs, grids and masks chosen on the host. No kernel runs here."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from hypothesis import given
from hypothesis import strategies as st

from tilewright.aot.compiler import compile_launch
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.int8_linear import triton_swapped, triton_tile
from tilewright.kernels.int8_weight_only_linear import dequantize, triton_dequantize
from tilewright.kernels.int8_weight_only_linear import triton_swapped as weight_only
from tilewright.kernels.norm_quantize import triton_norm_quantize
from tilewright.kernels.quantize import triton_quantize
from tilewright.kernels.triton import common
from tilewright.kernels.triton.split_k import MAX_SPLIT, choose_split

H200 = {"device": "cuda", "capability": (9, 0), "multiprocessors": 132}
A100 = {"device": "cuda", "capability": (8, 0), "multiprocessors": 108}
L4 = {"device": "cuda", "capability": (8, 9), "multiprocessors": 58}
B200 = {"device": "cuda", "capability": (10, 0), "multiprocessors": 148}
MI300 = {"device": "cuda", "gpu_arch": "gfx942", "multiprocessors": 304}
GPUS = {"H200": H200, "A100": A100, "L4": L4, "B200": B200, "MI300": MI300}
ON_EACH_GPU = pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
NO_END = {"bias": None, "residual": None, "activation": "none"}
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])


def int8_problem(m: int, n: int, k: int, gpu: dict = H200, dtype: torch.dtype = torch.float16) -> Problem:
    return Problem("int8_linear", m, n, k, dtype, **gpu)


def meta(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def plan_int8(plan, m: int, n: int, k: int, config=None, out_dtype: torch.dtype = torch.float16) -> list:
    scale = meta(n, dtype=torch.float32)
    return plan(
        meta(m, k),
        meta(m, dtype=torch.float32),
        meta(n, k),
        scale,
        meta(m, n, dtype=out_dtype),
        config,
        **NO_END,
    )


# ------------------------------------------------------------------------------------------------ what they decline


@pytest.mark.parametrize(
    "module",
    [triton_quantize, triton_norm_quantize, triton_swapped, triton_tile, weight_only],
    ids=lambda m: m.__name__.split("kernels.")[1],
)
def test_what_every_kernel_declines(module):
    problem = int8_problem(8, 4096, 4096)
    assert module.why_not(problem) is None
    assert module.why_not(replace(problem, capability=None, gpu_arch="gfx942")) is None
    assert "on 'cpu'" in module.why_not(replace(problem, device="cpu"))
    assert "has 7.5" in module.why_not(replace(problem, capability=(7, 5)))
    assert "torch.float64" in module.why_not(replace(problem, x_dtype=torch.float64))


def test_sums_that_may_leave_int32_are_declined():
    longest = common.MAX_K
    assert longest * 127**2 < 2**31 <= (longest + 1) * 127**2
    for module in (triton_swapped, triton_tile):
        assert module.why_not(int8_problem(8, 64, longest)) is None
        assert "int32" in module.why_not(int8_problem(8, 64, longest + 1))


def test_quantised_activations_are_taken_too():
    problem = replace(int8_problem(8, 64, 64), op="int8_linear_quantized", x_dtype=torch.int8)
    assert triton_swapped.why_not(problem) is None
    assert triton_tile.why_not(problem) is None


def test_large_batches_go_elsewhere():
    assert triton_swapped.why_not(int8_problem(triton_swapped.MAX_M, 64, 64)) is None
    assert "larger tiles" in triton_swapped.why_not(int8_problem(triton_swapped.MAX_M + 1, 64, 64))
    assert triton_tile.why_not(int8_problem(100_000, 64, 64)) is None
    assert weight_only.why_not(int8_problem(weight_only.MAX_M, 64, 64)) is None
    assert "dequantise" in weight_only.why_not(int8_problem(weight_only.MAX_M + 1, 64, 64))
    wide = replace(int8_problem(weight_only.SMALL_M + 1, 64, 64), compute_dtype=torch.float32)
    assert "float32" in weight_only.why_not(wide)
    assert dequantize.why_not(wide) is None
    assert "torch.float64" in dequantize.why_not(replace(wide, x_dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------- heuristics


@ON_EACH_GPU
@given(m=st.integers(1, 5000), n=st.integers(1, 40_000), k=st.integers(0, 40_000), dtype=DTYPES)
def test_heuristics_choose_from_the_configs_that_are_tested(gpu, m, n, k, dtype):
    problem = int8_problem(m, n, k, gpu, dtype)
    tile = triton_tile.TileConfig.for_problem(problem)
    assert tile in triton_tile.CONFIGS
    assert tile.suits(problem)
    quantize = triton_quantize.QuantizeConfig.for_problem(problem)
    assert quantize in triton_quantize.CONFIGS or quantize.one_block
    if m <= triton_swapped.MAX_M:
        check_swapped(triton_swapped, problem)
    if weight_only.why_not(problem) is None:
        check_swapped(weight_only, problem)


def check_swapped(module, problem: Problem) -> None:
    """The tile is one of those tested, whatever the number of parts, and those are few enough to be worth it."""
    config = module.SwappedConfig.for_problem(problem)
    assert config.suits(problem)
    tested = [replace(other, split_k=config.split_k) for other in module.CONFIGS]
    assert config in tested
    assert config.split_k in (1, 2, 4, 8)
    if config.split_k > 1:
        block_k = getattr(config, "block_k", 128)
        assert -(-problem.k // block_k) >= 4 * config.split_k
        assert config.split_k * -(-problem.n // config.block_n) <= 4 * problem.multiprocessors


@ON_EACH_GPU
@given(n=st.integers(1, 40_000), k=st.integers(1, 40_000), rows=st.lists(st.integers(1, 256), min_size=2, max_size=2))
def test_how_k_is_cut_does_not_depend_on_the_batch(gpu, n, k, rows):
    # Float32 sums change with the cut, and a row of the result must not change with the other rows.
    families = {(m > weight_only.SMALL_M) + (m > weight_only.MIDDLE_M) for m in rows}
    splits = {weight_only.SwappedConfig.for_problem(int8_problem(m, n, k, gpu)).split_k for m in rows}
    assert len(splits) == 1 or len(families) == 2


@pytest.mark.parametrize(
    "m, n, k, expected",
    [
        (1, 4096, 4096, (16, 64, 4)),
        (16, 28672, 4096, (16, 64, 1)),
        (17, 4096, 4096, (32, 64, 4)),
        (64, 4096, 4096, (64, 64, 4)),
        (64, 8192, 8192, (64, 64, 2)),
        (64, 28672, 4096, (64, 128, 1)),
        (128, 4096, 4096, (64, 64, 1)),
        (128, 28672, 4096, (128, 128, 1)),
        (1, 64, 256, (16, 64, 1)),
    ],
)
def test_what_a_swapped_product_chooses_on_h200(m, n, k, expected):
    config = triton_swapped.SwappedConfig.for_problem(int8_problem(m, n, k))
    assert (config.block_m, config.block_n, config.split_k) == expected


@pytest.mark.parametrize(
    "m, gpu, expected",
    [
        (4096, H200, triton_tile.BIG_TILE),
        (4096, A100, triton_tile.BIG_TILE_MMA_SYNC),
        (4096, B200, triton_tile.BIG_TILE_MMA_SYNC),
        (4096, MI300, triton_tile.AMD_TILE),
        (600, H200, triton_tile.MIDDLE_TILE),
        (256, H200, triton_tile.SMALL_TILE),
    ],
)
def test_what_a_large_product_chooses(m, gpu, expected):
    assert triton_tile.TileConfig.for_problem(int8_problem(m, 4096, 4096, gpu)) == expected


def test_parts_of_k():
    assert choose_split(programs=264, tiles=64, steps=32) == 4
    assert choose_split(programs=264, tiles=64, steps=15) == 2  # each part keeps four steps
    assert choose_split(programs=264, tiles=1, steps=1000) == MAX_SPLIT
    assert choose_split(programs=264, tiles=0, steps=0) == 1
    assert choose_split(programs=264, tiles=500, steps=1000) == 1


# ------------------------------------------------------------------------------------------------------------ plans


@given(m=st.integers(1, 300), n=st.integers(1, 600), k=st.integers(0, 2000), index=st.integers(0, 100))
def test_programs_cover_the_result_and_parts_cover_k(m, n, k, index):
    config = triton_swapped.CONFIGS[index % len(triton_swapped.CONFIGS)]
    first, *rest = plan_int8(triton_swapped.plan_swapped, m, n, k, config)
    tiles_n, tiles_m, parts = first.grid
    assert (tiles_n - 1) * config.block_n < n <= tiles_n * config.block_n
    assert (tiles_m - 1) * config.block_m < m <= tiles_m * config.block_m
    assert parts == config.split_k
    assert parts * first.args["part_k"] >= k
    assert first.args["part_k"] % first.constants["BLOCK_K"] == 0
    assert len(rest) == (config.split_k > 1)
    for reduce in rest:
        sums = reduce.args["sums_ptr"]
        assert sums is first.args["out_ptr"]
        assert (sums.shape, sums.dtype) == ((parts, m, n), torch.int32)
        assert reduce.constants["SPLIT_K"] == parts


@given(m=st.integers(1, 1000), n=st.integers(1, 1000), k=st.integers(0, 2000), index=st.integers(0, 100))
def test_tiles_cover_the_result_and_masks_go_only_where_k_is_even(m, n, k, index):
    config = triton_tile.CONFIGS[index % len(triton_tile.CONFIGS)]
    (launch,) = plan_int8(triton_tile.plan_tile, m, n, k, config)
    assert launch.grid == (-(-m // config.block_m) * -(-n // config.block_n),)
    assert launch.constants["EVEN_K"] == (k % config.block_k == 0)


def test_weight_only_parts_are_float32():
    case = meta(4, 4096, dtype=torch.bfloat16), meta(64, 4096), meta(64, dtype=torch.float32)
    product, reduce = weight_only.plan_swapped(*case, torch.bfloat16, meta(4, 64, dtype=torch.bfloat16), **NO_END)
    assert product.args["out_ptr"].dtype == torch.float32
    assert product.args["out_ptr"].shape == (8, 4, 64)
    assert reduce.args["x_scale_ptr"] is None


@pytest.mark.parametrize("k", [1, 63, 64, 384, 768, 4096, 5000, 16384, 16385, 50_000])
@pytest.mark.parametrize("subtract_mean", [False, True])
def test_rows_are_covered(k, subtract_mean):
    x, q, scale = meta(37, k, dtype=torch.float16), meta(37, k), meta(37, dtype=torch.float32)
    (quantize,) = triton_quantize.plan_quantize_per_row(x, None, q, scale)
    (norm,) = triton_norm_quantize.plan_norm_quantize(x, None, None, 1e-5, subtract_mean, q, scale)
    for launch in (quantize, norm):
        rows, block_k = launch.constants["ROWS"], launch.constants["BLOCK_K"]
        assert launch.grid[0] * rows >= 37 > (launch.grid[0] - 1) * rows
        assert launch.constants["ONE_BLOCK"] == (k <= 16384)
        assert block_k >= k or not launch.constants["ONE_BLOCK"]
        assert rows * block_k <= 16384


def test_a_batch_of_another_size_is_the_same_binary():
    # The batch is a run-time argument that Triton must not specialise: else M = 1 or 16 would compile anew.
    small = plan_int8(triton_swapped.plan_swapped, 1, 4096, 4096)
    large = plan_int8(triton_swapped.plan_swapped, 16, 4096, 4096)
    assert [launch.constants for launch in small] == [launch.constants for launch in large]
    for launch in small:
        assert next(p for p in launch.kernel.params if p.name == "M").do_not_specialize


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_weight_is_widened_16_bytes_at_a_time(dtype: torch.dtype, target: str) -> None:
    launch = triton_dequantize.plan_widen(meta(64, 4096), meta(64, 4096, dtype=dtype))
    assert launch.grid == (64 * 4096 // triton_dequantize.BLOCK,)
    compiled = compile_launch(launch, target)
    each = triton_dequantize.BLOCK // (compiled.num_warps * compiled.target.warp_size * 16)
    assert compiled.instructions.loads == {16: each}
    if compiled.target.backend == "cuda":
        assert len(re.findall(r"st\.global\.v4\.b32", compiled.ptx)) == 2 * each
    assert compiled.spill_bytes == 0
