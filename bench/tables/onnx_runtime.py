"""Linear layers and encoders on this CPU beside ONNX Runtime: the goals, and what was measured.

    python -m bench.tables.onnx_runtime [--shape N K ...] [--batches M ...] [--no-models] [--no-linear] [--csv FILE]

Every variant computes from the same integers and scales, or from the same float32 model, and its result is checked
first. The variants of a row are timed in turn in one process and medians are compared. Threads spin after a run and
slow down whatever comes next, so each measurement waits until all are at rest, and follows a run that is not counted.
OpenMP binds no thread (OMP_PROC_BIND): ONNX Runtime's inherit the binding of the one that makes them, and all would be
on its core. Layers are called again and again, as in a loop over tokens: those that fit the last-level cache stay in
it.

int4 has groups of 128 and activations in int8, ONNX Runtime's at accuracy level 4; int8 is dynamic in both. Beside each
stand the share of the int8 peak, measured in registers, and of the memory bandwidth, measured by reading, that its
products and weights amount to.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CORES = sorted(os.sched_getaffinity(0))

try:
    import onnx  # noqa: F401  (onnx_peers makes models with it)
    import onnxruntime
except ImportError as error:
    sys.exit(f"{error}: this benchmark needs onnx and onnxruntime, and transformers for the encoders")
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
import tilewright.nn as tnn
from bench import onnx_peers
from bench.result_files import RESULTS
from bench.timer import interleaved
from tilewright.kernels.cpu import native, peaks
from tilewright.kernels.cpu.peaks import Peaks
from tilewright.kernels.dispatch.router import route

THREADS = 2
SHAPES = ((768, 3072), (2048, 2048), (4096, 4096), (4096, 14336))
BATCHES = (1, 4, 16, 64, 128, 512)
#: Variants of a linear layer: bits of its weights, and by how much it is to be faster than ONNX Runtime at M rows.
GOALS: dict[str, tuple[int, Callable[[int], float]]] = {
    "int4 asymmetric": (4, lambda m: 1.1),
    "int4 symmetric": (4, lambda m: 1.1),
    "int8": (8, lambda m: 1.2 if m <= 16 else 1.0),
}
#: Largest relative error from the rounding of activations, against float64 of the very integers that are multiplied.
LARGEST_ERROR = 0.02
#: hidden size, layers, heads, intermediate size
ENCODERS = {"MiniLM": (384, 6, 12, 1536), "BERT-base": (768, 12, 12, 3072)}
SEQUENCE = 128
ENCODER_GOALS = {"over ONNX Runtime int8": 1.1, "over eager": 5.0}
Row = dict[str, object]


def medians(functions: dict[str, Callable[[], object]], seconds: float, one_pool: bool = False) -> dict[str, float]:
    """Median seconds of a call of each function, all timed in turn; short ones several times in a row.

    one_pool: all of them run on PyTorch's threads, which then neither rest in between nor are bound: MKL's float32
    products take up to twice as long where they are.
    """
    return interleaved(functions, seconds=seconds, rounds=5, turn=2e-3, rest=not one_pool).medians()


def error_of(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of ``y``. Raises ValueError where it is no rounding any more."""
    error = ((y.double() - expected).norm() / expected.norm()).item()
    if not error <= LARGEST_ERROR:
        raise ValueError(f"a relative error of {error:.2g}")
    return error


def layers(n: int, k: int, folder: Path) -> dict[str, tuple[nn.Module, onnx_peers.Run, torch.Tensor]]:
    """By variant: our layer, ONNX Runtime's, and the float64 weight that both multiply by."""
    linear = nn.Linear(k, n, bias=False)
    found: dict[str, tuple[nn.Module, onnx_peers.Run, torch.Tensor]] = {}
    for variant in GOALS:
        if variant == "int8":
            ours: Any = tnn.Int8Linear.from_float(linear)
            theirs = onnx_peers.int8_linear(ours.dequantize_weight(), folder, THREADS)
        else:
            ours = tnn.Int8ActInt4WeightLinear.from_float(
                linear, group_size=onnx_peers.GROUP, symmetric=variant.endswith(" symmetric"), range_search="minmax"
            )
            theirs = onnx_peers.int4_linear(ours.weight_packed, ours.weight_scale, ours.weight_zero, k, THREADS)
        found[variant] = ours, theirs, ours.dequantize_weight().double()
    return found


def measure_linear(n: int, k: int, batches: list[int], seconds: float, peak: Peaks) -> list[Row]:
    """A row for each batch and variant."""
    torch.manual_seed(0)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        made = layers(n, k, Path(folder))
        for m in batches:
            x = torch.randn(m, k)
            calls: dict[str, Callable[[], object]] = {}
            errors: dict[str, tuple[float, float]] = {}
            with torch.no_grad():
                for variant, (ours, theirs, weight) in made.items():
                    expected = F.linear(x.double(), weight)
                    errors[variant] = error_of(ours(x), expected), error_of(theirs(x), expected)
                    calls[f"{variant} ours"] = lambda f=ours, x=x: f(x)
                    calls[f"{variant} theirs"] = lambda f=theirs, x=x: f(x)
                found = medians(calls, seconds)
            for variant, (bits, goal) in GOALS.items():
                ours_s, theirs_s = found[f"{variant} ours"], found[f"{variant} theirs"]
                rows.append(
                    {
                        "what": f"{n} x {k}",
                        "batch": m,
                        "variant": variant,
                        "served_by": route(made[variant][0].problem(m)).name,
                        "ms": f"{1e3 * ours_s:.4f}",
                        "onnxruntime_ms": f"{1e3 * theirs_s:.4f}",
                        "over_onnxruntime": f"{theirs_s / ours_s:.2f}",
                        "goal": goal(m),
                        "met": "yes" if theirs_s / ours_s >= goal(m) else "no",
                        "percent_of_int8_peak": f"{100 * 2 * m * n * k / ours_s / peak.products('int8'):.0f}",
                        "percent_of_bandwidth": f"{100 * n * k * bits / 8 / ours_s / peak.bandwidth():.0f}",
                        "error": f"{errors[variant][0]:.2g}",
                        "onnxruntime_error": f"{errors[variant][1]:.2g}",
                    }
                )
    return rows


def measure_encoder(name: str, batches: list[int], seconds: float, peak: Peaks) -> list[Row]:
    """A row for each batch of a BERT with random weights, in sequences of ``SEQUENCE`` tokens without padding."""
    from transformers import BertConfig, BertModel

    hidden, depth, heads, intermediate = ENCODERS[name]
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=hidden, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=intermediate
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    weights = sum(p.numel() for module in model.modules() if isinstance(module, nn.Linear) for p in [module.weight])
    rows: list[Row] = []
    multiplied = peak.products("int8")
    samples = {batch: torch.randint(0, config.vocab_size, (batch, SEQUENCE)) for batch in batches}

    def timed(runs: dict[str, onnx_peers.Run], ids: torch.Tensor, one_pool: bool = False) -> dict[str, float]:
        inputs = ids, torch.ones_like(ids)
        return medians({v: lambda f=f: f(*inputs) for v, f in runs.items()}, seconds, one_pool)

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        variants: dict[str, onnx_peers.Run] = {
            "eager": onnx_peers.HiddenState(model),
            "int8": onnx_peers.HiddenState(tw.convert_model(model, "int8")),
        }
        # Before ONNX Runtime has any threads.
        alone = {batch: timed(variants, ids, one_pool=True) for batch, ids in samples.items()}
        variants |= onnx_peers.encoders(model, heads, hidden, Path(folder), THREADS)
        for batch, ids in samples.items():
            inputs = ids, torch.ones_like(ids)
            expected = variants["eager"](*inputs).double()
            errors = {
                variant: ((run(*inputs).double() - expected).norm() / expected.norm()).item()
                for variant, run in variants.items()
            }
            found = timed({v: f for v, f in variants.items() if v != "eager"}, ids)
            theirs = min((v for v in found if v.startswith("ONNX")), key=lambda v: found[v])
            over = {"ONNX": found[theirs] / found["int8"], "eager": alone[batch]["eager"] / alone[batch]["int8"]}
            for goal, factor in ENCODER_GOALS.items():
                other = "ONNX" if "ONNX" in goal else "eager"
                rows.append(
                    {
                        "what": name,
                        "batch": batch,
                        "variant": f"int8 {goal}",
                        "served_by": f"against {theirs if other == 'ONNX' else other}",
                        "ms": f"{1e3 * found['int8']:.3f}",
                        "onnxruntime_ms": f"{1e3 * found[theirs]:.3f}",
                        "eager_ms": f"{1e3 * alone[batch]['eager']:.3f}",
                        "over_onnxruntime": f"{over['ONNX']:.2f}",
                        "over_eager": f"{over['eager']:.2f}",
                        "goal": factor,
                        "met": "yes" if over[other] >= factor else "no",
                        "percent_of_int8_peak": f"{200 * batch * SEQUENCE * weights / found['int8'] / multiplied:.0f}",
                        "percent_of_bandwidth": f"{100 * weights / found['int8'] / peak.bandwidth():.0f}",
                        "error": f"{errors['int8']:.2g}",
                        "onnxruntime_error": f"{errors[theirs]:.2g}",
                    }
                )
    return rows


COLUMNS = (
    *("what", "batch", "variant", "served_by", "ms", "onnxruntime_ms", "eager_ms", "over_onnxruntime", "over_eager"),
    *("goal", "met", "percent_of_int8_peak", "percent_of_bandwidth", "error", "onnxruntime_error"),
)


def about(peak: Peaks) -> Row:
    """Machine and versions, the same in every row."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "machine": names[0].partition(":")[2].strip() if names else platform.machine(),
        "isa": native.isa(),
        "threads": THREADS,
        "int8_peak_gops": f"{peak.products('int8') / 1e9:.0f}",
        "memory_gb_s": f"{peak.bandwidth() / 1e9:.1f}",
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "tilewright": tw.__version__,
        "date": datetime.date.today().isoformat(),
    }


def print_row(row: Row) -> None:
    """One line of the table."""
    print(
        f"| {row['what']} | {row['batch']} | {row['variant']} | {row['ms']} | {row['onnxruntime_ms']} "
        f"| {row['over_onnxruntime']}x | {row.get('over_eager', '')} | {row['goal']}x {row['met']} "
        f"| {row['percent_of_int8_peak']} | {row['percent_of_bandwidth']} | {row['served_by']} |",
        flush=True,
    )


def main() -> None:
    """Measure, print the table, and write it with what it was measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=2, type=int, action="append", metavar=("N", "K"))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--models", nargs="*", choices=list(ENCODERS), default=list(ENCODERS))
    parser.add_argument("--no-linear", action="store_true", help="encoders only")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each row of the table; default: 1.5")
    parser.add_argument("--csv", type=Path, help=f"where to write the rows, for example {RESULTS / 'cpu.csv'}")
    parser.add_argument("--append", action="store_true", help="keep the rows that FILE has of other layers and models")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    peak = peaks.measure()
    print(
        f"int8 peak {peak.products('int8') / 1e9:.0f} GOPS, memory {peak.bandwidth() / 1e9:.1f} GB/s, {THREADS} threads"
    )
    print("| what | batch | variant | ms | ONNX Runtime ms | over it | over eager | goal | % peak | % memory | by |")
    print("|---" * 11 + "|")
    rows: list[Row] = []
    parts = [] if options.no_linear else [(n, k) for n, k in options.shape or SHAPES]
    for n, k in parts:
        for batch in options.batches:
            found = measure_linear(n, k, [batch], options.seconds, peak)
            rows += found
            for row in found:
                print_row(row)
    for name in options.models:
        found = measure_encoder(name, [1, 8], options.seconds * 4, peak)
        rows += found
        for row in found:
            print_row(row)
    if options.csv:
        write(options.csv, [{**row, **about(peak)} for row in rows], options.append)


def write(path: Path, rows: list[Row], append: bool) -> None:
    """Write ``rows``; those of the file that are of other layers and models stay in front of them if ``append``."""
    kept: list[Row] = []
    if append and path.is_file():
        new = {(row["what"], str(row["batch"])) for row in rows}
        with path.open(newline="") as file:
            kept = [dict(row) for row in csv.DictReader(file) if (row["what"], row["batch"]) not in new]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *(name for name in rows[0] if name not in COLUMNS)], restval="")
        writer.writeheader()
        writer.writerows([*kept, *rows])


if __name__ == "__main__":
    main()
