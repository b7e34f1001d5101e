"""Whether any converted linear layer is slower than the float32 layer it replaces, on the machine this runs on.

    python -m bench.tables.never_slower [--shapes 384x384 ...] [--rows 1 8 ...] [--formats int8 ...] [--seconds 0.1]

30 shapes of layers as they are found in models, five batches and every format, eager mode: a few minutes. Layers take
turns with the float layer; a turn lasts half a millisecond or one call. Of each the fastest quarter of its calls
counts, since whatever else the machine does only adds to them. What seems slower is measured up to three times, and is
a miss where it is slower each time. The exit status is 1 if there are misses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import tilewright.nn as tnn
from bench.timer import Busy, interleaved
from tilewright.kernels.cpu import native
from tilewright.kernels.dispatch.router import route
from tilewright.nn.quantized_linear import QuantizedLinear

#: Below this share of the float layer's speed a layer counts as slower: nearer than that they are as good as equal.
LEAST = 0.97
TRIES = 3
ROWS = (1, 8, 32, 128, 704)
#: Output x input features: small layers, MiniLM, DistilBERT and BERT, ViT-L, Whisper, GPT-2, small Llamas and Qwens.
SHAPES = (
    *((64, 64), (128, 128), (256, 256), (384, 384), (512, 512), (768, 768), (1024, 1024), (1536, 1536), (2048, 2048)),
    *((1536, 384), (384, 1536), (2048, 512), (512, 2048), (3072, 768), (768, 3072), (4096, 1024), (1024, 4096)),
    *((1152, 384), (2304, 768), (768, 192), (192, 768), (1000, 1280), (10, 512), (1000, 2048), (256, 2048)),
    *((896, 4864), (4864, 896), (2048, 5632), (5632, 2048), (4096, 4096)),
)
#: How each format makes a layer. The quickest search of ranges: it changes no time.
FORMATS: Mapping[str, Callable[[nn.Linear], QuantizedLinear]] = {
    "int8": tnn.Int8Linear.from_float,
    "int8-wo": tnn.Int8WeightOnlyLinear.from_float,
    "int8-wo, float32": lambda linear: tnn.Int8WeightOnlyLinear.from_float(linear, compute_dtype=torch.float32),
    "int4": lambda linear: tnn.Int4Linear.from_float(linear, group_size=128, range_search="minmax"),
    "int4-g32": lambda linear: tnn.Int4Linear.from_float(linear, group_size=32, symmetric=False, range_search="minmax"),
    "w4a8": lambda linear: tnn.Int8ActInt4WeightLinear.from_float(linear, group_size=128, range_search="minmax"),
}
#: Relative errors that a format and random weights explain.
ERRORS = {"int8": 0.03, "int8-wo": 0.02, "int8-wo, float32": 0.02, "int4": 0.2, "int4-g32": 0.15, "w4a8": 0.2}


@dataclass(frozen=True)
class Cell:
    """One layer at one batch. ratio: how many times as fast as float32, the best of the tries. by: what served it."""

    n: int
    k: int
    rows: int
    name: str
    ratio: float
    by: str

    @property
    def missed(self) -> bool:
        """Whether it is slower than the float layer."""
        return self.ratio < LEAST


def ratios(
    float_layer: nn.Module, layers: Mapping[str, nn.Module], x: torch.Tensor, seconds: float
) -> dict[str, float]:
    """Of each layer, how many times as fast it is as ``float_layer``; ``seconds`` for each of them."""
    calls = {"": lambda: float_layer(x), **{name: lambda layer=layer: layer(x) for name, layer in layers.items()}}
    times = interleaved(calls, seconds=seconds * len(calls), rounds=4, turn=0.0005, shuffle=True).times
    return {name: times[""].fastest / times[name].fastest for name in layers}


def measure(n: int, k: int, batches: Sequence[int], formats: Sequence[str], seconds: float) -> list[Cell]:
    """A cell for each format and batch. Raises ValueError where a result is wrong."""
    linear = nn.Linear(k, n).requires_grad_(False)
    layers = {name: FORMATS[name](linear) for name in formats}
    cells = []
    for rows in batches:
        x = torch.randn(rows, k)
        with torch.inference_mode():
            expected = linear(x)
            for name, layer in layers.items():
                error = ((layer(x) - expected).norm() / expected.norm()).item()
                if not error <= ERRORS[name]:
                    raise ValueError(f"{name} {n} x {k} at {rows} rows has a relative error of {error:.2g}")
            best = ratios(linear, layers, x, seconds)
            for _ in range(TRIES - 1):
                again = {name: layers[name] for name, ratio in best.items() if ratio < LEAST}
                if not again:
                    break
                best |= {name: max(ratio, best[name]) for name, ratio in ratios(linear, again, x, 2 * seconds).items()}
        cells += [Cell(n, k, rows, name, ratio, route(layers[name].problem(rows)).name) for name, ratio in best.items()]
    return cells


def _shape(text: str) -> tuple[int, int]:
    try:
        n, k = (int(part) for part in text.split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 3072x768") from error
    return n, k


def main(arguments: list[str] | None = None) -> int:
    """The command line above; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=_shape, default=list(SHAPES), metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--seconds", type=float, default=0.05, help="for each layer and batch; default: 0.05")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    isa = native.why_no_native() or native.isa()
    busy, cells = Busy(), []
    print(f"times as fast as nn.Linear in float32; {isa}, {torch.get_num_threads()} threads")
    print("| N x K | rows | " + " | ".join(options.formats) + " |")
    print("|---" * (2 + len(options.formats)) + "|")
    for n, k in options.shapes:
        for rows in options.rows:
            found = measure(n, k, [rows], options.formats, options.seconds)
            cells += found
            shown = [f"{cell.ratio:.2f}{' (slower)' if cell.missed else ''}" for cell in found]
            print(f"| {n} x {k} | {rows} | " + " | ".join(shown) + " |", flush=True)
    missed = [cell for cell in cells if cell.missed]
    share = busy.share()
    print(f"\n{len(missed)} of {len(cells)} below {LEAST}x" + ("" if share is None else f"; others used {share:.0%}"))
    for cell in missed:
        print(f"- {cell.name}, {cell.n} x {cell.k}, {cell.rows} rows: {cell.ratio:.2f}x by {cell.by}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
