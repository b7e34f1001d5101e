"""2:4 linear layers on a CPU beside the dense layer of the same dtype: the table of docs/sparse24.md.

    python -m bench.tables.sparse24_cpu                     all shapes, as Markdown; about two minutes
    python -m bench.tables.sparse24_cpu --shape 384 384     one shape (N K)

Layers are called in turns, in an order that is drawn anew each round, so that each finds the caches as the others left
them; medians. Every result is compared with the dense layer of the pruned weight before it is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

from bench.timer import interleaved
from tilewright.kernels.dispatch import router
from tilewright.nn import Sparse24Int4Linear, Sparse24Int8Linear, Sparse24Linear

#: N x K.
SHAPES = ((384, 384), (1536, 384), (384, 1536), (3072, 768), (768, 3072), (4096, 4096))
BATCHES = (1, 16, 128, 512)
KINDS = {"2:4": Sparse24Linear, "2:4 int8": Sparse24Int8Linear, "2:4 int4": Sparse24Int4Linear}
#: Largest relative error against the dense layer of the same weight.
ERROR = 0.02


def measure(n: int, k: int, dtype: torch.dtype, batches: tuple[int, ...], seconds: float) -> Iterator[list[str]]:
    """Cells of the table, a row for each batch. Raises ValueError for a layer that is wrong."""
    linear = nn.Linear(k, n).to(dtype)
    layers = {name: kind.from_float(linear) for name, kind in KINDS.items()}  # type: ignore[attr-defined]
    for m in batches:
        x = torch.randn(m, k).to(dtype)
        with torch.inference_mode():
            for name, layer in layers.items():
                expected = nn.functional.linear(x.float(), layer.dequantize_weight(), layer.bias.float())
                error = (layer(x).float() - expected).norm() / expected.norm()
                if not error <= ERROR:
                    raise ValueError(f"{name} at M={m}, N={n}, K={k} has a relative error of {error:.2g}")
            calls: dict[str, Callable[[], object]] = {
                name: (lambda layer=layer, x=x: layer(x))  # type: ignore[misc]
                for name, layer in {"dense": linear, **layers}.items()
            }
            found = interleaved(calls, seconds=seconds, rounds=5, waking=0, shuffle=True).medians()
        dense = found.pop("dense")
        dispatched = router.describe(layers["2:4"].problem(m, dtype))
        cells = [f"{dense / time:.2f}x" for time in found.values()]
        yield [f"{n} x {k}", str(m), str(dtype).removeprefix("torch."), f"{1e6 * dense:.0f}", *cells, dispatched]


def main(arguments: list[str] | None = None) -> int:
    """The command line above; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=2, type=int, action="append", metavar=("N", "K"))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each batch of a shape")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print("| N x K | rows | dense layer | us | " + " | ".join(KINDS) + " | 2:4 served by |")
    print("|---" * (len(KINDS) + 5) + "|")
    for n, k in options.shape or SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for row in measure(n, k, dtype, tuple(options.batches), options.seconds):
                print("| " + " | ".join(row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
