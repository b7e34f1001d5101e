"""What int8 and int4 layers gain over float32 on this CPU: 4096 x 4096, float32 input, eager mode.

    python -m bench.tables.speed [--rows 1 16 128 512] [--seconds 3] [--check]

A turn is a series of calls: each layer has the cache to itself, as one that is called again and again has. (Called once
in a while, it must fetch its weight, and no int8 layer can be more than four times as fast at one row;
``python -m bench linear`` measures that.) ``--check`` compares with the ratios below, where there are any for this
instruction set, and ends with status 1 if one is missed.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import nn

from bench.timer import interleaved
from tilewright.kernels.cpu import native
from tilewright.kernels.dispatch.router import route
from tilewright.nn import Int4Linear, Int8Linear

SIZE = 4096
ROWS = (1, 16, 128, 512)
#: Largest relative error that the format explains.
ERRORS = {"int8": 0.02, "int4": 0.15}
#: By instruction set, scheme and rows: less than was measured.
GOALS = {
    "avx2": {"int8": {1: 3.0, 16: 3.0, 128: 2.0, 512: 1.7}, "int4": {1: 3.0, 16: 2.0, 128: 1.5, 512: 1.2}},
    "avx512_bf16": {"int8": dict.fromkeys(ROWS, 5.0), "int4": {1: 8.0, 16: 1.5, 128: 1.5, 512: 1.5}},
}
GOALS["amx"] = GOALS["avx512_bf16"]


def isa_in_use() -> str:
    """The instruction set of the C kernels, or why there are none."""
    return native.why_no_native() or native.isa()


def main(arguments: list[str] | None = None) -> int:
    """The command line above; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=SIZE, help=f"rows and columns of the weight; default: {SIZE}")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line; default: 3")
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a goal is missed")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    linear = nn.Linear(options.size, options.size)
    layers = {"int8": Int8Linear.from_float(linear), "int4": Int4Linear.from_float(linear, group_size=128)}
    isa = isa_in_use()
    goals, missed = GOALS.get(isa, {}), 0
    print(f"{options.size} x {options.size}, {isa}, {torch.get_num_threads()} threads")
    print("| scheme | rows | float32, us | ours, us | times as fast | others busy | implementation |")
    print("|---" * 7 + "|")
    for m in options.rows:
        x = torch.randn(m, options.size)
        for name, layer in layers.items():
            with torch.inference_mode():
                expected = linear(x)
                error = ((layer(x) - expected).norm() / expected.norm()).item()
                if not error <= ERRORS[name]:
                    raise ValueError(f"{name} at {m} rows has a relative error of {error:.2g}")
                calls = {"float32": lambda x=x: linear(x), "ours": lambda layer=layer, x=x: layer(x)}
                found = interleaved(calls, seconds=options.seconds, turn=0.02, waking=10)
            medians = found.medians()
            ratio, goal = medians["float32"] / medians["ours"], goals.get(name, {}).get(m)
            cells = [f"{1e6 * medians['float32']:.0f}", f"{1e6 * medians['ours']:.0f}", f"{ratio:.2f}x"]
            cells += ["" if found.busy is None else f"{found.busy:.0%}", route(layer.problem(m)).name]
            if options.check and goal is not None and ratio < goal:
                missed += 1
                cells[2] += f" (below {goal}x)"
            print("| " + " | ".join([name, str(m), *cells]) + " |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
