"""W8A16 linear layer for small and middle batches in Triton: the operands are swapped, and K may be split.

    y[m, n] = activation(s_w[n] * sum_k x[m, k] * w[n, k] + b[n]) + r[m, n]

x fp16, bf16 or fp32 [M, K] with contiguous rows, rounded to the compute dtype; w int8 [N, K], rows contiguous; s_w [N];
b [N]; r [M, N] of any strides; y [M, N]. Sums are float32.

A program computes a tile of y transposed, w_tile @ x_tile^T, with the weight as the left operand: there the tensor
cores of 9.x take it from registers, where int8 becomes the compute dtype (exactly: 127 has seven bits), and it never
returns to shared memory. Its scale multiplies the sums. Where N alone gives too few programs, K is split
(``triton.split_k``). Within a family (M <= 16, M <= 128, or more) K is cut alike for every batch: no row depends on the
others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem, device_facts, rows_aligned
from tilewright.kernels.epilogue import End
from tilewright.kernels.matrices import FLOAT_DTYPES, rows_of
from tilewright.kernels.triton.common import named_kernel, why_not_on_gpu
from tilewright.kernels.triton.linear import run_linear
from tilewright.kernels.triton.split_k import choose_split
from tilewright.kernels.triton.swapped import plan_swapped_product, swapped_product
from tilewright.kernels.tuning import tunable, why_too_large

SMALL_M, MIDDLE_M, MAX_M = 16, 128, 256
# Every tile of features rounds x to the compute dtype for itself; where x is more than this, that is done once before.
# A float32 tile of 128 rows would also not fit into the registers of 8.x.
CAST_ON_LOAD_M = 64
AMD_STAGES = 2  # 64 KB of shared memory


@dataclass(frozen=True)
class SwappedConfig:
    """block_m rows of the batch (16 to 128) x block_n features, block_k of the sum; split_k: parts of K. block_sums:
    the products of a block are added up by themselves.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    block_sums: bool = False

    @classmethod
    def for_problem(cls, problem: Problem) -> SwappedConfig:
        """Up to 128 rows in one tile, and enough parts of K to keep every multiprocessor reading.

        Small batches want two programs for each multiprocessor, larger ones one: every part costs another M x N float32
        written and read. On 9.x twice as many up to 128 rows: measured on an H200, with longer steps and fewer stages.
        """
        multiprocessors = problem.multiprocessors or 132
        wide = triton.cdiv(problem.n, WIDE.block_n) >= multiprocessors
        if problem.multiply_dtype == torch.float32:
            config, waves = FLOAT32, 2
        elif problem.m <= SMALL_M:
            config, waves = (HOPPER_SMALL, 4) if problem.is_hopper else (SMALL, 2)
        elif problem.m > 64 and wide:
            config, waves = WIDE, 1
        elif problem.is_hopper:
            config = next((c for c in HOPPER_MIDDLE if problem.m <= c.block_m), HOPPER_MIDDLE[-1])
            waves = 2 if problem.m <= MIDDLE_M else 1
        else:
            config, waves = next((c for c in MIDDLE if problem.m <= c.block_m), MIDDLE[-1]), 1
        programs = waves * multiprocessors
        # From tiles of 64 features, whatever the config has: the split may not depend on the batch.
        split_k = choose_split(programs, triton.cdiv(problem.n, 64), triton.cdiv(problem.k, config.block_k))
        num_stages = config.num_stages if problem.gpu_arch is None else AMD_STAGES
        block_sums = config.block_sums or _needs_block_sums(problem)
        return replace(config, split_k=split_k, num_stages=num_stages, block_sums=block_sums)

    def suits(self, problem: Problem) -> bool:
        """Whether ``for_problem`` may choose this config for the device and compute dtype of ``problem``."""
        float32 = self.block_k == FLOAT32.block_k
        amd = self.num_stages == AMD_STAGES
        return (
            float32 == (problem.multiply_dtype == torch.float32)
            and amd == (problem.gpu_arch is not None)
            and self.block_sums == (float32 or _needs_block_sums(problem))
        )


def _needs_block_sums(problem: Problem) -> bool:
    """On 9.x, Triton lets the product of one iteration run on into the next, which overwrites the weights that it reads
    from registers (triton-lang/triton#9433; seen in the PTX of 3.7).
    """
    return problem.is_hopper


SMALL = SwappedConfig(16, 64, 128, split_k=1, num_warps=4, num_stages=5)
MIDDLE = (
    SwappedConfig(32, 64, 64, split_k=1, num_warps=4, num_stages=4),
    SwappedConfig(64, 64, 64, split_k=1, num_warps=4, num_stages=4),
    SwappedConfig(128, 64, 64, split_k=1, num_warps=4, num_stages=3),
)
WIDE = SwappedConfig(128, 128, 64, split_k=1, num_warps=8, num_stages=3)
HOPPER_SMALL = SwappedConfig(16, 64, 128, split_k=1, num_warps=4, num_stages=3)
HOPPER_MIDDLE = tuple(
    SwappedConfig(rows, 64, 128, split_k=1, num_warps=4, num_stages=3, block_sums=True) for rows in (32, 64, 128)
)
# No tensor core multiplies float32 exactly: the products are unrolled into FMAs, so the step is short.
# One long chain of float32 additions loses twice what PyTorch's product does. Two warps, because with four Triton 3.7
# rounds x to tf32 on 10.x, whatever precision is asked for, if the other operand was int8 (triton-lang/triton#10176).
FLOAT32 = SwappedConfig(16, 64, 32, split_k=1, num_warps=2, num_stages=4, block_sums=True)
_TILES = [SMALL, *MIDDLE, WIDE, FLOAT32]
_CONFIGS = [*_TILES, *(replace(config, split_k=4) for config in _TILES if config != WIDE)]
_HOPPER = [
    replace(WIDE, block_sums=True),
    *(replace(c, block_sums=True, split_k=split_k) for c in (HOPPER_SMALL, *HOPPER_MIDDLE) for split_k in (1, 4)),
]
#: Every tile that the heuristic chooses, with and without a split, on NVIDIA and on AMD.
CONFIGS = [*_CONFIGS, *_HOPPER, *(replace(config, num_stages=AMD_STAGES) for config in _CONFIGS)]


def candidates(problem: Problem) -> Iterator[SwappedConfig]:
    """Batch tiles that the batch fills at least by half, and the next smaller one; one shape in float32."""
    heuristic = SwappedConfig.for_problem(problem)
    full = min(max(triton.next_power_of_2(problem.m), 16), 128)
    stages = (AMD_STAGES,) if problem.gpu_arch is not None else (3, 4, 5)
    if problem.multiply_dtype == torch.float32:
        yield from (replace(heuristic, split_k=split_k) for split_k in (1, 2, 4, 8))
        return
    for block_m in (size for size in (16, 32, 64, 128) if full // 2 <= size <= full):
        for block_n, block_k, num_warps in ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)):
            for num_stages, split_k in itertools.product(stages, (1, 2, 4, 8)):
                yield SwappedConfig(block_m, block_n, block_k, split_k, num_warps, num_stages, heuristic.block_sums)


def why_not_config(config: SwappedConfig, problem: Problem) -> str | None:
    """The reason why a launch with ``config`` cannot serve ``problem``, or does so wastefully for sure; or None."""
    if config.split_k > 1 and config.split_k * 4 > triton.cdiv(problem.k, config.block_k):
        return "parts of less than four steps do not fill the pipeline of loads"
    tile = config.block_k * (config.block_n + config.block_m * problem.x_dtype.itemsize)
    return why_too_large(problem, tile, config.num_stages)


TUNED = tunable(
    __name__, SwappedConfig.for_problem, candidates, why_not_config, shares=("tilewright.kernels.triton.swapped",)
)


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None."""
    if problem.x_dtype not in FLOAT_DTYPES or problem.multiply_dtype not in FLOAT_DTYPES:
        return f"takes float16, bfloat16 and float32, not {problem.x_dtype} computed in {problem.multiply_dtype}"
    if problem.multiply_dtype == torch.float32 and problem.m > SMALL_M:
        return f"{problem.m} rows of float32 are bound by arithmetic: a library's float32 product is faster"
    if problem.m > MAX_M:
        return f"{problem.m} rows are bound by arithmetic: to dequantise once and call the library is faster"
    return why_not_on_gpu(problem)


weight_only_kernel = named_kernel(swapped_product, "weight_only_kernel")


def plan_swapped(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    compute_dtype: torch.dtype,
    out: torch.Tensor,
    config: SwappedConfig | None = None,
    **end: Unpack[End],
) -> list[Launch]:
    """The one or two launches that write ``out`` [M, N]; x [M, K] and weight [N, K] with contiguous rows."""
    (m, k), n = x.shape, weight.shape[0]
    if config is None:
        problem = Problem("int8_weight_only_linear", m=m, n=n, k=k, x_dtype=x.dtype, compute_dtype=compute_dtype)
        config = TUNED.choose(replace(problem, aligned=rows_aligned(x), **device_facts(x.device)))
    operands = (x, weight, None, weight_scale, out, compute_dtype)
    return plan_swapped_product(weight_only_kernel, *operands, config, config.block_k, config.block_sums, **end)


def int8_weight_only_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    compute_dtype: torch.dtype | None = None,
    **end: Unpack[End],
) -> torch.Tensor:
    """x float [..., K], weight int8 [N, K], weight_scale [N], bias [N], residual [..., N] -> x.dtype [..., N]."""
    compute = compute_dtype or x.dtype

    def launches(out: torch.Tensor, **end: Unpack[End]) -> list[Launch]:
        rows = rows_of(x.to(compute) if len(out) > CAST_ON_LOAD_M else x)
        return plan_swapped(rows, rows_of(weight), weight_scale.contiguous(), compute, out, **end)

    return run_linear(x, len(weight), x.dtype, launches, **end)
