"""W8A8 linear layer for small and middle batches in Triton: the operands are swapped, and K may be split.

    y[m, n] = activation(s_x[m] * s_w[n] * sum_k x[m, k] * w[n, k] + b[n]) + r[m, n]

x int8 [M, K] and w int8 [N, K], rows contiguous; s_x float32 [M]; s_w [N]; b [N]; r [M, N] of any strides; y [M, N].

Here the weight is read once and everything waits for it. A program computes a tile of y transposed, w_tile @ x_tile^T,
so that the features fill the 64 rows which a warp group's matrix instruction wants, and the batch need only fill its
columns, 16 at the least. Where N alone gives too few programs to keep the memory busy, K is split: each part writes its
int32 sums, and a second kernel adds them in order of K and applies the epilogue. Integer sums are exact, so
neither the split nor the batch changes a result.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import End
from tilewright.kernels.int8_linear.triton_operators import operators, product_problem, why_not_int8_product
from tilewright.kernels.triton.common import named_kernel
from tilewright.kernels.triton.split_k import choose_split
from tilewright.kernels.triton.swapped import plan_swapped_product, swapped_product
from tilewright.kernels.tuning import tunable, why_too_large

MAX_M = 128
SMALL_M = 16
BLOCK_K = 128
HOPPER_BLOCK_M = 64
AMD_STAGES = 2  # 64 KB of shared memory


@dataclass(frozen=True)
class SwappedConfig:
    """block_m: rows of the batch (16 to 128), block_n: features (64 or 128), split_k: parts that K is cut into."""

    block_m: int
    block_n: int
    split_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def for_problem(cls, problem: Problem) -> SwappedConfig:
        """One tile over the batch, and as many parts of K as keep every multiprocessor reading.

        Small batches: four programs fit on a multiprocessor and two are asked for, each with four steps along K or
        more. Larger ones: one, because each part costs another M x N int32 written and read.

        On 9.x (measured on an H200): two up to a batch tile of 64, and two of these for larger batches, whose programs
        read from memory while others multiply; a tile of 128 rows took 1.3 to 1.6 times as long.
        """
        small, hopper = problem.m <= SMALL_M, problem.is_hopper
        multiprocessors = problem.multiprocessors or 132
        block_m = min(max(triton.next_power_of_2(problem.m), 16), MAX_M)
        wide = block_m >= 64 and triton.cdiv(problem.n, 128) >= multiprocessors
        if hopper and not wide:
            block_m = min(block_m, HOPPER_BLOCK_M)
        block_n = 128 if wide else 64
        tiles_m = triton.cdiv(problem.m, block_m)
        programs = (2 if small or (hopper and tiles_m == 1) else 1) * multiprocessors
        split_k = choose_split(programs, tiles_m * triton.cdiv(problem.n, block_n), triton.cdiv(problem.k, BLOCK_K))
        if problem.gpu_arch is not None:
            num_stages = AMD_STAGES
        elif small or (hopper and block_m <= HOPPER_BLOCK_M):
            num_stages = 5
        else:
            num_stages = 4 if block_m < 128 else 3
        return cls(block_m, block_n, split_k, num_warps=8 if wide else 4, num_stages=num_stages)

    def suits(self, problem: Problem) -> bool:
        """Whether ``for_problem`` may choose this config on the device of ``problem``."""
        return (self.num_stages == AMD_STAGES) == (problem.gpu_arch is not None)


_CONFIGS = [
    SwappedConfig(16, 64, split_k=1, num_warps=4, num_stages=5),
    SwappedConfig(16, 64, split_k=4, num_warps=4, num_stages=5),
    SwappedConfig(32, 64, split_k=1, num_warps=4, num_stages=4),
    SwappedConfig(32, 64, split_k=2, num_warps=4, num_stages=4),
    SwappedConfig(64, 64, split_k=2, num_warps=4, num_stages=4),
    SwappedConfig(64, 128, split_k=1, num_warps=8, num_stages=4),
    SwappedConfig(128, 64, split_k=2, num_warps=4, num_stages=3),
    SwappedConfig(128, 128, split_k=1, num_warps=8, num_stages=3),
    SwappedConfig(32, 64, split_k=2, num_warps=4, num_stages=5),
    SwappedConfig(64, 64, split_k=1, num_warps=4, num_stages=5),
    SwappedConfig(64, 64, split_k=2, num_warps=4, num_stages=5),
    SwappedConfig(64, 128, split_k=1, num_warps=8, num_stages=5),
]
#: Every tile that the heuristic chooses, with and without a split, on NVIDIA and on AMD.
CONFIGS = [*_CONFIGS, *(replace(config, num_stages=AMD_STAGES) for config in _CONFIGS)]


def candidates(problem: Problem) -> Iterator[SwappedConfig]:
    """Batch tiles that the batch fills at least by half, and the next smaller one."""
    full = min(max(triton.next_power_of_2(problem.m), 16), MAX_M)
    stages = (AMD_STAGES,) if problem.gpu_arch is not None else (3, 4, 5)
    for block_m in (size for size in (16, 32, 64, 128) if full // 2 <= size <= full):
        for block_n, num_warps in ((64, 4), (128, 4), (128, 8)):
            for num_stages, split_k in itertools.product(stages, (1, 2, 4, 8)):
                yield SwappedConfig(block_m, block_n, split_k, num_warps, num_stages)


def why_not_config(config: SwappedConfig, problem: Problem) -> str | None:
    """The reason why a launch with ``config`` cannot serve ``problem``, or does so wastefully for sure; or None."""
    if config.split_k > 1 and config.split_k * 4 > triton.cdiv(problem.k, BLOCK_K):
        return "parts of less than four steps do not fill the pipeline of loads"
    return why_too_large(problem, (config.block_m + config.block_n) * BLOCK_K, config.num_stages)


TUNED = tunable(
    __name__, SwappedConfig.for_problem, candidates, why_not_config, shares=("tilewright.kernels.triton.swapped",)
)


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None."""
    if problem.m > MAX_M:
        return f"a batch of {problem.m} is bound by arithmetic, not by reading the weight: larger tiles are faster"
    return why_not_int8_product(problem)


swapped_kernel = named_kernel(swapped_product, "swapped_kernel")


def plan_swapped(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out: torch.Tensor,
    config: SwappedConfig | None = None,
    **end: Unpack[End],
) -> list[Launch]:
    """The one or two launches that write ``out`` [M, N]; x [M, K] and weight [N, K] int8 with contiguous rows."""
    config = config or TUNED.choose(product_problem(x, len(weight)))
    operands = (x, weight, x_scale, weight_scale, out, torch.int8)
    return plan_swapped_product(swapped_kernel, *operands, config, BLOCK_K, **end)


int8_linear, int8_linear_quantized = operators(plan_swapped)
