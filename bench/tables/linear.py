"""Linear layers on this CPU, side by side: what a float32 model's owner has, and what each scheme gives.

    python -m bench.tables.linear [--shape N K ...] [--batches 1 16 128 512] [--csv FILE]

Every layer is made from the same float32 layer and fed the same random float32 input; its output is checked first.
The variants of a row are timed in turn in one process and the medians compared, so that a machine that slows down
slows all of them. Baselines: ``F.linear`` in float32 and bfloat16, and oneDNN's prepacked float32 product, which
PyTorch uses under ``torch.compile`` with frozen weights only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import tilewright.nn as tnn
from bench.result_files import RESULTS, write_measured
from bench.timer import interleaved

SHAPES = ((4096, 4096), (3072, 768), (768, 3072), (384, 384))
BATCHES = (1, 16, 128, 512)
#: Largest relative error of each variant's output that is still its own rounding and no mistake (random normal data).
ERRORS = {"fp32 oneDNN": 1e-5, "bf16": 0.01, "int8": 0.02, "int8 weight-only": 0.02, "int4": 0.15, "int8 x int4": 0.15}


def variants(linear: nn.Linear) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Functions of the float32 input, by name; the first one is the baseline."""
    bias = linear.bias.detach()
    weight = linear.weight.detach()
    prepacked = torch.ops.mkldnn._reorder_linear_weight(weight)
    low = weight.bfloat16()
    low_bias = bias.bfloat16()
    return {
        "fp32": linear,
        "fp32 oneDNN": lambda x: torch.ops.mkldnn._linear_pointwise(x, prepacked, bias, "none", [], ""),
        "bf16": lambda x: F.linear(x.bfloat16(), low, low_bias),
        "int8": tnn.Int8Linear.from_float(linear),
        "int8 weight-only": tnn.Int8WeightOnlyLinear.from_float(linear),
        "int4": tnn.Int4Linear.from_float(linear, range_search="minmax"),
        "int8 x int4": tnn.Int8ActInt4WeightLinear.from_float(linear, range_search="minmax"),
    }


def measure(n: int, k: int, batches: tuple[int, ...], seconds: float) -> list[dict[str, object]]:
    """One row for each batch and variant. Raises ValueError if an output is wrong."""
    torch.manual_seed(0)
    linear = nn.Linear(k, n)
    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        layers = variants(linear)
        for m in batches:
            x = torch.randn(m, k)
            expected = F.linear(x.double(), linear.weight.double(), linear.bias.double())
            for name, layer in layers.items():
                error = ((layer(x).double() - expected).norm() / expected.norm()).item()
                if error > ERRORS.get(name, 1e-5):
                    raise ValueError(f"{name} at M={m}, N={n}, K={k} has a relative error of {error:.2g}")
            calls = {name: (lambda layer=layer, x=x: layer(x)) for name, layer in layers.items()}
            medians = interleaved(calls, seconds=seconds, waking=0).medians()
            rows += [
                {
                    "n": n,
                    "k": k,
                    "m": m,
                    "variant": name,
                    "ms": f"{1e3 * value:.3f}",
                    "speedup": f"{medians['fp32'] / value:.2f}",
                }
                for name, value in medians.items()
            ]
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    """Speed-up over float32 ``F.linear``: a line for each shape and batch."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    print("| N x K | M | fp32 ms | " + " | ".join(str(name) for name in names[1:]) + " |")
    print("|---" * (len(names) + 2) + "|")
    for n, k, m in dict.fromkeys((row["n"], row["k"], row["m"]) for row in rows):
        cells = {row["variant"]: row for row in rows if (row["n"], row["k"], row["m"]) == (n, k, m)}
        values = " | ".join(f"{float(str(cells[name]['speedup'])):.1f}x" for name in names[1:])
        print(f"| {n} x {k} | {m} | {cells['fp32']['ms']} | {values} |")


def main() -> None:
    """Measure, print the table and write it with what it was measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=2, type=int, action="append", metavar=("N", "K"))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=1.5, help="for each shape and batch; default: 1.5")
    parser.add_argument("--csv", type=Path, help=f"where to write the rows, for example {RESULTS / 'cpu_linear.csv'}")
    options = parser.parse_args()
    rows = [row for n, k in options.shape or SHAPES for row in measure(n, k, tuple(options.batches), options.seconds)]
    print_table(rows)
    if options.csv:
        write_measured(options.csv, rows)


if __name__ == "__main__":
    main()
