"""The real tables: linear layers beside every peer that is installed, in one process, each checked before it is timed.

    python -m bench.tables.peers [--device cpu|cuda] [--shape 4096x4096 ...] [--m 1 16 128 512] [--variants TEXT ...]
                        [--minutes 20] [--output bench/results/NAME]

writes NAME.csv, NAME.md and NAME.png: speed-up over what a float model's owner has, GB/s, TFLOP/s, and the share of the
roofline, whose ceilings are a GPU's datasheet, and on a CPU measured in the same run. Rows that are there already stay
unless they are measured anew, and the files are whole after every shape, so a run can be stopped and continued.

CPU: there are two copies of every variant. When all threads are at rest, one call of the first wakes its own, then one
of the second is timed, whose weight was last touched a round ago: it comes from memory. GPU: from one end to the other
of a CUDA graph, after a read of twice the L2 cache, and beside it the same call without a graph.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench.layers import CPU, GPU, Variant, semi_structured
from bench.result_files import RESULTS, Row, about, markdown, merge, plot, read_rows, slug, write_rows
from bench.timer import Call, interleaved
from tilewright.autotune.clock import GpuClock
from tilewright.kernels.roofline import Ceilings, ceilings_for, highest, measure_cpu

SHAPES = {"cpu": ((4096, 4096),), "cuda": ((4096, 4096), (8192, 8192), (28672, 4096), (16384, 16384))}
BATCHES = {"cpu": (1, 16, 128, 512), "cuda": (1, 16, 32, 64, 128, 256, 512, 2048)}
ROUNDS = 11


def measure_gpu(clock: GpuClock) -> Ceilings:
    """A copy of 1 GiB, and products of 8192 x 8192 x 8192 on random data, on this GPU."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    q = torch.randint(-127, 128, (8192, 8192), dtype=torch.int8, device="cuda")
    runs: tuple[Call, ...] = (lambda: target.copy_(source), lambda: a @ a, lambda: torch._int_mm(q, q.t()))
    copied, floats, integers = (statistics.median(clock.seconds(clock.prepare(run), 7)) for run in runs)
    operations = 2 * 8192**3
    name = torch.cuda.get_device_name()
    rates = (2 * source.numel() / copied, operations / floats, operations / integers)
    return Ceilings(name, rates[0], rates[1], rates[1], rates[2], 4e-6, "measured here")


def ceilings_of_gpu(clock: GpuClock) -> Ceilings:
    """By the datasheet; measured where there is none. What can be measured is no ceiling: on an H200 a copy moved
    2.8 TB/s and the library's int8 product did 0.97 POP/s, where layers read 4.0 TB/s and did 1.16 POP/s.
    """
    try:
        return ceilings_for(torch.cuda.get_device_name())
    except ValueError:
        return measure_gpu(clock)


def expected_of(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The layer in float64, on a few rows, and those rows' indices are first and last."""
    bias = None if linear.bias is None else linear.bias.double()
    return F.linear(_few(x).double(), linear.weight.double(), bias)


def _few(x: torch.Tensor) -> torch.Tensor:
    return x if len(x) <= 8 else torch.cat([x[:4], x[-4:]])


def check(
    variant: Variant, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, expected: torch.Tensor
) -> float:
    """The relative error of ``run(x)``. Raises ValueError if it is larger than the format's rounding."""
    y = run(x)
    if y.shape != (len(x), expected.shape[1]):
        raise ValueError(f"{variant.name} gives {list(y.shape)}, not {[len(x), expected.shape[1]]}")
    error = ((_few(y).double() - expected).norm() / expected.norm()).item()
    if not error <= variant.error:
        raise ValueError(f"{variant.name} has a relative error of {error:.2g}, its format explains {variant.error:g}")
    return error


def floor_of(variant: Variant, m: int, n: int, k: int, ceilings: Ceilings, x_bytes: int) -> tuple[float, int]:
    """(seconds that nothing can go below, bytes moved)."""
    moved = int(variant.weight_bits / 8 * n * k) + (m * k + m * n) * x_bytes
    return max(moved / ceilings.bytes, 2 * m * n * k / ceilings.operations(variant.operation)), moved


def most_of(
    variants: Sequence[Variant], base: float, m: int, n: int, k: int, ceilings: Ceilings, x_bytes: int
) -> dict[str, float]:
    """The speed-up of a layer at its format's floor over one that takes ``base`` seconds."""
    return {v.format: base / floor_of(v, m, n, k, ceilings, x_bytes)[0] for v in variants}


def measure(
    variants: Sequence[Variant], m: int, n: int, k: int, ceilings: Ceilings, device: str, rounds: int = ROUNDS
) -> list[Row]:
    """A row for each variant at one shape: those that are missing or wrong with the reason and without a time."""
    torch.manual_seed(0)
    # Dynamo compiles a function eight times and no more: what comes after that would be timed uncompiled.
    torch._dynamo.reset()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    linear = nn.Linear(k, n, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(m, k, device=device, dtype=dtype)
    rows: list[Row] = []
    made: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {}
    with torch.inference_mode():
        expected = expected_of(linear, x)
        for variant in variants:
            row = Row(m, n, k, variant.format, variant.name, **about(device))
            try:
                copies = [variant.make(linear, m) for _ in range(2 if device == "cpu" else 1)]
                base = expected if variant.make is not semi_structured else variant.make(linear, m)(_few(x)).double()
                errors = [check(variant, run, x, base) for run in copies]
            # A peer may fail in any way: the table says how.
            except Exception as error:
                rows.append(replace(row, note=f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"))
                continue
            made[variant.name] = copies
            rows.append(replace(row, error=float(f"{max(errors):.2g}")))
        graph, eager = (_time_cpu if device == "cpu" else _time_gpu)(variants, made, x, rounds)
    found = []
    for row, variant in zip(rows, variants, strict=True):
        seconds = graph.get(row.variant)
        if seconds is not None:
            floor, moved = floor_of(variant, m, n, k, ceilings, x.element_size())
            alone = eager.get(row.variant)
            row = replace(
                row,
                microseconds=round(1e6 * seconds, 2),
                eager_microseconds=None if alone is None else round(1e6 * alone, 2),
                speedup=round(graph[variants[0].name] / seconds, 3),
                gigabytes_per_second=round(moved / seconds / 1e9, 1),
                teraops_per_second=round(2 * m * n * k / seconds / 1e12, 3),
                of_roofline=round(floor / seconds, 3),
            )
        found.append(row)
    return found


def _time_cpu(
    variants: Sequence[Variant], made: Mapping[str, Sequence[Any]], x: torch.Tensor, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    wake, calls = ({name: lambda run=copies[i]: run(x) for name, copies in made.items()} for i in range(2))
    return interleaved(calls, rounds=rounds, wake=wake, evict=True, rest=True).medians(), {}


def _time_gpu(
    variants: Sequence[Variant], made: Mapping[str, Sequence[Any]], x: torch.Tensor, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    clock = GpuClock(x.device)
    graph: dict[str, float] = {}
    eager: dict[str, float] = {}
    for name, (run,) in made.items():
        call = lambda run=run: run(x)  # noqa: E731  (bound to this variant)
        for _ in range(3):
            call()
        eager[name] = statistics.median(clock.seconds(call, rounds))
        try:
            graph[name] = statistics.median(clock.seconds(clock.prepare(call), rounds))
        except RuntimeError:  # not every peer can be captured
            graph[name] = eager[name]
    return graph, eager


def _shape(text: str) -> tuple[int, int]:
    n, k = text.lower().split("x")
    return int(n), int(k)


def finish(rows: Sequence[Row], output: Path, ceilings: Ceilings, variants: Sequence[Variant], x_bytes: int) -> None:
    """Write the markdown table and the plot of ``rows``."""
    title = f"Linear layers on {rows[0].device}"
    output.with_suffix(".md").write_text(markdown(rows, title), encoding="utf-8")
    rooflines: dict[tuple[int, int], dict[str, dict[int, float]]] = {}
    for base in rows:
        if base.variant == variants[0].name and base.microseconds is not None:
            sizes = (base.m, base.n, base.k)
            for name, most in most_of(variants, base.microseconds / 1e6, *sizes, ceilings, x_bytes).items():
                rooflines.setdefault((base.n, base.k), {}).setdefault(name, {})[base.m] = most
    try:
        plot(rows, output.with_suffix(".png"), rooflines)
    except ImportError:
        print("no plot: matplotlib is not installed")


def _measure_ceilings(device: str) -> Ceilings:
    return measure_cpu() if device == "cpu" else ceilings_of_gpu(GpuClock(torch.device("cuda")))


def against(row: Row, variants: Sequence[Variant], ceilings: Ceilings, x_bytes: int) -> Row:
    """``row`` with its share of the roofline under ``ceilings``."""
    variant = next((one for one in variants if one.name == row.variant), None)
    if variant is None or row.microseconds is None:
        return row
    floor, _ = floor_of(variant, row.m, row.n, row.k, ceilings, x_bytes)
    return replace(row, of_roofline=round(1e6 * floor / row.microseconds, 3))


def tables(
    device: str,
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    variants: Sequence[Variant],
    output: Path,
    minutes: float,
    given: Ceilings | None = None,
) -> bool:
    """Measure every shape and batch within ``minutes``; False if the time was over before. given: the ceilings, instead
    of measuring them.
    """
    end = time.monotonic() + 60 * minutes
    ceilings, x_bytes = given or _measure_ceilings(device), 4 if device == "cpu" else 2
    print(
        f"ceilings: {ceilings.bytes / 1e9:.1f} GB/s, {ceilings.float32 / 1e12:.3f} TFLOP/s in float32, "
        f"{ceilings.float16 / 1e12:.3f} in bfloat16, {ceilings.int8 / 1e12:.3f} TOP/s in int8",
        flush=True,
    )
    csv_path = output.with_suffix(".csv")
    rows = read_rows(csv_path)
    for n, k in shapes:
        for m in batches:
            if time.monotonic() > end:
                print("the time is over: the tables hold what was measured")
                return False
            new = measure(variants, m, n, k, ceilings, device)
            if given is None:  # the highest of all measurements: a machine that was busy for a while has no lower roof
                ceilings = highest(ceilings, _measure_ceilings(device))
            rows = [against(row, variants, ceilings, x_bytes) for row in merge(rows, new)]
            write_rows(rows, csv_path)
            finish(rows, output, ceilings, variants, x_bytes)
            for row in rows:
                if (row.n, row.k, row.m) == (n, k, m):
                    print(in_words(row), flush=True)
    return True


def in_words(row: Row) -> str:
    """A line of the printed table."""
    what = f"{row.variant[:34]:35}{row.m:6} x{row.n:6} x{row.k:6}"
    if row.microseconds is None:
        return f"{what}  {row.note}"
    rates = f"{row.gigabytes_per_second:9.1f}{row.teraops_per_second:9.3f}{row.of_roofline:9.0%}"
    return f"{what}{row.microseconds:12.1f}{row.speedup:8.2f}x{rates}"


def main(arguments: list[str] | None = None) -> int:
    """The command line above; returns the exit status: 1 where the time was over before the tables were whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", type=_shape, action="append", metavar="NxK")
    parser.add_argument("--m", type=int, nargs="+", metavar="M")
    parser.add_argument("--variants", nargs="+", metavar="TEXT", help="only those whose name contains one of these")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2, help="on a CPU; default: 2")
    parser.add_argument("--output", type=Path, help="without a suffix; default: bench/results/NAME_<device>")
    parser.add_argument("--name", default="linear", help="of the files; default: linear")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: torch.cuda.is_available() is False")
        return 1
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    everything = CPU if options.device == "cpu" else GPU
    required = options.variants or [""]
    variants = [v for i, v in enumerate(everything) if i == 0 or any(text in v.name for text in required)]
    name = "cpu" if options.device == "cpu" else slug(torch.cuda.get_device_name())
    output = options.output or RESULTS / f"{options.name}_{name}"
    shapes, batches = options.shape or SHAPES[options.device], options.m or BATCHES[options.device]
    return int(not tables(options.device, shapes, batches, variants, output, options.minutes))


if __name__ == "__main__":
    sys.exit(main())
