"""Convolution layers of ResNet-50 beside the library's (cuDNN, or oneDNN on a CPU), with bias and ReLU.

    python -m bench.tables.conv_layers [--device cpu|cuda] [--batch 1 32] [--minutes 5]

writes bench/results/conv_<device>.csv. bfloat16 on a GPU, float32 on a CPU, and int8 for ours. The library's layer is
what a user has: channels-last, then bias and ReLU in calls of their own. Each result is checked on the first image
before it is timed; clocks and roofline as in ``bench.tables.peers``. m, n, k: pixels of the result, output channels,
window.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from bench.result_files import RESULTS, Row, about, merge, read_rows, slug, write_rows
from bench.tables.peers import ROUNDS, ceilings_of_gpu, in_words, interleaved
from tilewright.autotune.clock import GpuClock
from tilewright.kernels.conv_geometry import ConvGeometry, oihw
from tilewright.kernels.dispatch.card import make_arguments
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.roofline import Ceilings, floor, measure_cpu
from tilewright.kernels.tuning import Checker

#: Input channels, size, output channels, window, stride: one layer of each kind that ResNet-50 has most of.
LAYERS = (
    (3, 224, 64, 7, 2),
    (64, 56, 64, 1, 1),
    (64, 56, 64, 3, 1),
    (256, 56, 128, 1, 1),
    (128, 28, 128, 3, 1),
    (512, 28, 1024, 1, 2),
    (256, 14, 256, 3, 1),
    (1024, 14, 256, 1, 1),
    (512, 7, 512, 3, 1),
)


def problem_of(layer: tuple[int, int, int, int, int], batch: int, dtype: torch.dtype) -> Problem:
    """The operator's problem for a layer of ``LAYERS``."""
    channels, size, out_channels, window, stride = layer
    half = window // 2
    sizes = ConvGeometry(
        batch, channels, size, size, out_channels, (window, window), (stride, stride), (half, half, half, half)
    )
    m, k = batch * sizes.out_height * sizes.out_width, window * window * channels
    op = "conv2d_fused" if dtype.is_floating_point else "int8_conv2d_fused"
    return Problem(op, m, out_channels, k, dtype, bias=True, activation="relu", conv=sizes, out_dtype=dtype)


def library(arguments: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """The same layer by ``F.conv2d`` and ``F.relu``."""
    x, weight = arguments["x"], oihw(arguments["weight"]).contiguous(memory_format=torch.channels_last)
    bias, padding = arguments["bias"].to(x.dtype), arguments["padding"][::2]
    return lambda: F.relu(F.conv2d(x, weight, bias, arguments["stride"], padding))


def measure(
    layer: tuple[int, int, int, int, int], batch: int, ceilings: Ceilings, device: str, rounds: int = ROUNDS
) -> list[Row]:
    """Rows for the library, and for ours in float and in int8."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    problems = {"library": problem_of(layer, batch, dtype), "Tilewright": problem_of(layer, batch, dtype)}
    problems["Tilewright int8"] = problem_of(layer, batch, torch.int8)
    made: dict[str, Callable[[], torch.Tensor]] = {}
    rows = []
    with torch.inference_mode():
        for name, problem in problems.items():
            arguments = make_arguments(problem, device)
            ours = getattr(torch.ops.tilewright, problem.op)
            run = library(arguments) if name == "library" else (lambda ours=ours, a=arguments: ours(**a))
            wrong = Checker(problem.op, arguments)(run())
            title = "cuDNN" if name == "library" and device == "cuda" else "oneDNN" if name == "library" else name
            channels, size, _, window, stride = layer
            kind = f"{window} x {window} / {stride} on {channels} x {size} x {size}, batch {batch}"
            row = Row(problem.m, problem.n, problem.k, kind, f"{title}: {kind}", note=wrong or "", **about(device))
            rows.append(row)
            if wrong is None:
                made[row.variant] = run
        seconds, eager = _time(made, device, rounds)
    found = []
    for row, problem in zip(rows, problems.values(), strict=True):
        time_taken, base = seconds.get(row.variant), seconds.get(rows[0].variant)
        if time_taken is not None:
            least = floor(problem, ceilings)
            alone = eager.get(row.variant)
            row = replace(
                row,
                microseconds=round(1e6 * time_taken, 2),
                eager_microseconds=None if alone is None else round(1e6 * alone, 2),
                speedup=None if base is None else round(base / time_taken, 3),
                gigabytes_per_second=round(least.memory * ceilings.bytes / time_taken / 1e9, 1),
                teraops_per_second=round(2 * problem.m * problem.n * problem.k / time_taken / 1e12, 3),
                of_roofline=round(least.seconds / time_taken, 3),
            )
        found.append(row)
    return found


def _time(
    made: dict[str, Callable[[], torch.Tensor]], device: str, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    if device == "cpu":
        return interleaved(made, rounds=rounds, evict=True, rest=True).medians(), {}
    clock = GpuClock(torch.device("cuda"))
    graph: dict[str, float] = {}
    eager: dict[str, float] = {}
    for name, run in made.items():
        prepared = clock.prepare(run)
        graph[name] = statistics.median(clock.seconds(prepared, rounds))
        eager[name] = statistics.median(clock.seconds(run, rounds))
    return graph, eager


def main(arguments: list[str] | None = None) -> int:
    """The command line above; returns the exit status: 1 where the time was over before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--minutes", type=float, default=30.0)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: torch.cuda.is_available() is False")
        return 1
    end = time.monotonic() + 60 * options.minutes
    ceilings = measure_cpu() if options.device == "cpu" else ceilings_of_gpu(GpuClock(torch.device("cuda")))
    name = "cpu" if options.device == "cpu" else slug(torch.cuda.get_device_name())
    path = RESULTS / f"conv_{name}.csv"
    rows = read_rows(path)
    for batch in options.batch:
        for layer in LAYERS:
            if time.monotonic() > end:
                print("the time is over: the table holds what was measured")
                return 1
            new = measure(layer, batch, ceilings, options.device)
            rows = merge(rows, new)
            write_rows(rows, path)
            print(*map(in_words, new), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
