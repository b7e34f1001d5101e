"""The floor of an operator on a named device: what no kernel can go below, in microseconds.

    python -m bench.tables.roofline --op int4_linear --shape 28672x4096 --m 1 16 64 --device H200
    python -m bench.tables.roofline --shape 4096x4096                     every format, on this machine's CPU

Devices are those of ``tilewright.kernels.roofline.CEILINGS``, by datasheet, or "cpu", measured here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.roofline import CEILINGS, Ceilings, Floor, ceilings_for, floor, measure_cpu

OPS = ("linear", "int8_linear", "int8_weight_only_linear", "int4_linear", "int4_int8_linear", "quantize_per_row")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def floors(
    ops: Sequence[str], m: int, n: int, k: int, ceilings: Ceilings, dtype: torch.dtype, group_size: int = 128
) -> dict[str, Floor]:
    """The floor of each operator at one shape; "linear" is the plain layer in ``dtype``."""
    half = torch.bfloat16 if dtype == torch.float32 else None
    base = Problem("linear", m, n, k, dtype, group_size=group_size, scale_dtype=torch.bfloat16)
    return {op: floor(replace(base, op=op, compute_dtype=None if op == "linear" else half), ceilings) for op in ops}


def main(arguments: list[str] | None = None) -> int:
    """The command line above; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, nargs="+", default=OPS)
    parser.add_argument("--shape", nargs="+", default=["4096x4096"], metavar="NxK")
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16, 64, 256, 2048])
    parser.add_argument("--device", default="cpu", help=f"cpu, or one of {', '.join(CEILINGS)}")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, else bf16")
    parser.add_argument("--group-size", type=int, default=128)
    options = parser.parse_args(arguments)
    try:
        ceilings = measure_cpu() if options.device == "cpu" else ceilings_for(options.device)
        shapes = [tuple(int(size) for size in text.lower().split("x")) for text in options.shape]
    except ValueError as error:
        parser.error(str(error))
    dtype = DTYPES[options.dtype or ("fp32" if options.device == "cpu" else "bf16")]
    print(f"{ceilings.name}, {ceilings.source}")
    print(f"{'operator':26}{'M':>7}{'N':>8}{'K':>8}{'floor us':>12}  {'bound':9}{'over linear':>12}")
    for n, k in shapes:
        for m in options.m:
            base = floors(["linear"], m, n, k, ceilings, dtype)["linear"].seconds
            for op, found in floors(options.op, m, n, k, ceilings, dtype, options.group_size).items():
                ratio = f"{base / found.seconds:.2f}x" if "quantize" not in op else ""
                print(f"{op:26}{m:7}{n:8}{k:8}{found.microseconds:12.2f}  {found.bound:9}{ratio:>12}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
