"""How the cost estimate ranks the configurations of a linear operator, beside real timings where there is a GPU.

    python -m bench.tables.estimates H200 --op int8_linear_quantized --m 1 64 1024

Configurations that the implementation takes on that chip are planned for the real problem; a few programs of each are
emulated. On a GPU of the chip's architecture each is timed too: the last column is the time taken over the estimate,
and the line below says how well both orders agree (Spearman's rank correlation, 1 for the same order).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch

from bench.catalogue import FAMILIES, Family, describe
from bench.problems import QUANTIZERS, Shape, make_arguments
from tilewright import aot
from tilewright.aot.cost import CHIPS, find_chip
from tilewright.aot.targets import find_target
from tilewright.autotune.clock import GpuClock

#: Parts of their operators, which a library's product follows.
PARTS = ("int4_linear dequantize", "int8_weight_only_linear widen")
OPS = tuple(dict.fromkeys(family.op for family in FAMILIES if family.op not in QUANTIZERS))


def candidates(op: str, shape: Shape, chip: str, device: str = "cpu") -> dict[tuple[str, str], list[aot.Launch]]:
    """The launches of each (family, config) that may serve ``shape`` on ``chip``, over tensors on ``device``."""
    arguments = make_arguments(op, shape, device)
    target = find_target(f"sm_{find_chip(chip).arch}")
    found = {}
    for family in FAMILIES:
        if family.name in PARTS:
            continue
        if family.op == op and family.why_not(family.problem(shape, target)) is None:
            for config in configs(family, shape, target):
                launches, _ = family.plan(arguments, config)
                found[family.name, describe(config)] = launches
    return found


def configs(family: Family, shape: Shape, target: Any) -> list[Any]:
    """Those of ``family`` that may be used for ``shape``."""
    problem = family.problem(shape, target)
    return [config for config in family.configs if getattr(config, "suits", lambda problem: True)(problem)]


def measured(op: str, shape: Shape, chip: str) -> dict[tuple[str, str], float]:
    """Median seconds of each candidate on the GPU that is here."""
    clock = GpuClock(torch.device("cuda", torch.cuda.current_device()))
    times = {}
    for name, launches in candidates(op, shape, chip, "cuda").items():

        def run(launches: list[aot.Launch] = launches) -> None:
            for launch in launches:
                launch.run()

        times[name] = statistics.median(clock.seconds(clock.prepare(run), 7))
    return times


def is_here(chip: str) -> bool:
    """Whether the current GPU has the architecture of ``chip``."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == divmod(find_chip(chip).arch, 10)


def agreement(estimates: dict[Any, float], times: dict[Any, float]) -> float:
    """Spearman's rank correlation of two orders of the same things; 1 where there are fewer than two."""
    if len(estimates) < 2:
        return 1.0
    places = [{name: i for i, name in enumerate(sorted(one, key=one.__getitem__))} for one in (estimates, times)]
    return statistics.correlation(*([place[name] for name in estimates] for place in places))


def show(op: str, shape: Shape, chip: str) -> None:
    """Print the ranking for one problem."""
    print(f"{op} {shape.m} x {shape.n} x {shape.k} on {chip}")
    estimates = aot.rank(candidates(op, shape, chip), chip)
    times = measured(op, shape, chip) if is_here(chip) else {}
    for name, least in estimates.items():
        taken = f"{times[name] * 1e6:10.1f} us taken{times[name] / least:7.2f}x" if times else ""
        print(f"  {least * 1e6:10.1f} us estimated{taken}  {': '.join(name)}")
    if times:
        print(f"  rank correlation {agreement(estimates, times):.2f}")


def main(arguments: list[str] | None = None) -> int:
    """The command line above; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chip", choices=CHIPS)
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--m", nargs="+", type=int, default=[1, 64, 1024], help="rows")
    parser.add_argument("--n", type=int, default=4096, help="output features")
    parser.add_argument("--k", type=int, default=4096, help="input features")
    options = parser.parse_args(arguments)
    for op in options.op:
        for m in options.m:
            show(op, Shape(m, options.n, options.k, group_size=128, bias=False), options.chip)
    return 0


if __name__ == "__main__":
    sys.exit(main())
