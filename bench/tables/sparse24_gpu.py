"""2:4 linear layers on a GPU against dense bfloat16, cuSPARSELt and int4: every implementation, whether or not the
router would choose it, so that the gate (``tilewright.kernels.sparse24_linear.gate``) can be set by what was measured.

    python -m bench.tables.sparse24_gpu     all shapes; writes bench/results/sparse24_<device>.csv and says which goals
                                            are met
        --quick     M = 1, 16 and 512 of the first shape
        --dry-run   a small shape on the CPU, nothing written: everything but the GPU's kernels

Every result is compared with the definition before it is timed, by replays of a CUDA graph that find the caches cold.
A variant called "routed" is what a user gets.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from bench.problems import SPARSE, Shape, dense_weight, make_arguments, reference
from bench.result_files import RESULTS, Row, about, slug, write_rows
from bench.tables.peers import ceilings_of_gpu, in_words
from tilewright.autotune.clock import Clock, CpuClock, GpuClock
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.dispatch.router import implementations, route
from tilewright.kernels.roofline import Ceilings
from tilewright.kernels.sparse24_linear import cusparselt, triton_fragments, triton_unpack

ROUNDS = 15
BATCHES = (1, 8, 16, 64, 512, 4096)
#: N x K.
FEATURES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
OPS = (*SPARSE, "int4_linear")


def runnable(op: str, problem: Problem) -> list[tuple[str, Callable[..., Any]]]:
    """Implementations that can compute the problem, by name, the gate left aside; without the definition."""
    reasons = {
        "Triton, mma.sp": triton_fragments.why_cannot,
        "Triton, unpacked in registers": triton_unpack.why_cannot,
        "cuSPARSELt": cusparselt.why_cannot,
    }
    if op not in SPARSE:
        return []
    found = []
    for one in implementations(op):
        if one.name != "reference" and reasons.get(one.name, one.why_not)(problem) is None:
            found.append((one.name, one.function))
    return found


def bytes_moved(arguments: dict[str, Any], n: int, out_bytes: int) -> int:
    """Bytes of all arguments, read once, and of the result, written once."""
    given = sum(t.numel() * t.element_size() for t in arguments.values() if isinstance(t, torch.Tensor))
    return given + arguments["x"].shape[0] * n * out_bytes


def assert_near_definition(op: str, arguments: dict[str, Any], found: torch.Tensor) -> None:
    """A corner and the opposite one against float64: cheap at any size, and before any time is taken.

    Raises ValueError. The bar is one part in 64 of the root mean square: what a wrong kernel passes by far. The tests
    hold results to the last place.
    """
    rows, columns, n = 8, 128, found.shape[1]
    for m_part, n_part in ((slice(0, rows), slice(0, columns)), (slice(-rows, None), slice(max(n - columns, 0), None))):
        few = {**arguments, "x": arguments["x"][m_part]}
        for name in ("weight", "weight_packed", "weight_values", "weight_meta", "weight_scale", "bias"):
            if few.get(name) is not None:
                few[name] = few[name][n_part]
        few = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in few.items()}
        expected = reference(op)(**few).double()
        error = (found[m_part, n_part].cpu().double() - expected).square().mean().sqrt()
        if not error <= expected.square().mean().sqrt() / 64:
            raise ValueError(f"{op}: RMS error {error:.3g} where the result is {expected.square().mean().sqrt():.3g}")


def measure(op: str, shape: Shape, ceilings: Ceilings, clock: Clock, device: torch.device) -> Iterator[Row]:
    """Rows for dense bfloat16, for each implementation, and for what the router chooses."""
    arguments = make_arguments(op, shape)
    arguments = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    m, n, k = shape.m, shape.n, shape.k

    def seconds(run: Callable[[], Any]) -> float:
        return statistics.median(clock.seconds(clock.prepare(run), ROUNDS))

    def dense_seconds() -> float:
        """Of cuBLAS on the dequantised weight, which is gone again afterwards."""
        dense = dense_weight(op, arguments).to(torch.bfloat16)
        x = torch.randn(arguments["x"].shape, dtype=torch.bfloat16, device=device)
        return seconds(lambda: F.linear(x, dense))

    baseline = dense_seconds()
    operation = torch.int8 if op == "sparse24_int8_linear" else torch.bfloat16

    def row(name: str, time: float, moved: int) -> Row:
        floor = max(moved / ceilings.bytes, 2 * m * n * k / ceilings.operations(operation))
        return Row(
            m,
            n,
            k,
            op,
            name,
            microseconds=round(time * 1e6, 2),
            speedup=round(baseline / time, 3),
            gigabytes_per_second=round(moved / time / 1e9, 1),
            teraops_per_second=round(2 * m * n * k / time / 1e12, 2),
            of_roofline=round(floor / time, 3),
            **about(device.type),
        )

    yield row("F.linear bfloat16", baseline, (m * k + n * k + m * n) * 2)
    facts = device_facts(device)
    if "group_size" in arguments:
        facts = {**facts, "group_size": arguments["group_size"], "scale_dtype": arguments["weight_scale"].dtype}
    problem, moved = Problem(op, m, n, k, arguments["x"].dtype, **facts), bytes_moved(arguments, n, 2)
    routed = route(problem).implementation
    for name, function in [*runnable(op, problem), (f"routed: {routed.name}", routed.function)]:
        assert_near_definition(op, arguments, function(**arguments))
        yield row(name, seconds(lambda function=function: function(**arguments)), moved)  # type: ignore[misc]


def goals(rows: list[Row]) -> list[str]:
    """Each goal with the worst figure it was missed or met by."""
    routed = [row for row in rows if row.variant.startswith("routed")]
    asked = (
        ("2:4 bf16 at M <= 16", 1.5, [r for r in routed if r.format == "sparse24_linear" and r.m <= 16]),
        ("2:4 int4 at M <= 16", 3.8, [r for r in routed if r.format == "sparse24_int4_linear" and r.m <= 16]),
        ("anything at 2:4", 0.97, [r for r in routed if r.format in SPARSE]),
    )
    lines = []
    for name, required, found in asked:
        if found:
            worst = min(found, key=lambda row: row.speedup or 0.0)
            verdict = "met" if (worst.speedup or 0.0) >= required else "MISSED"
            where = f"{worst.format}, M = {worst.m}, {worst.n} x {worst.k}"
            lines.append(
                f"{verdict}: {name} >= {required}x dense bfloat16; the least is {worst.speedup:.2f}x ({where})"
            )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The command line above; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, where there is no GPU")
    options = parser.parse_args(arguments)
    features, batches = FEATURES, BATCHES
    if options.dry_run:
        device, features, batches = torch.device("cpu"), ((256, 384),), (1, 16)
        clock: Clock = CpuClock()
        ceilings = Ceilings("none", *(1e12,) * 4, overhead=0.0, source="made up: a dry run")
    elif not torch.cuda.is_available():
        print("no GPU here: torch.cuda.is_available() is False (--dry-run does what can be done without)")
        return 1
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        gpu_clock = GpuClock(device)
        clock, ceilings = gpu_clock, ceilings_of_gpu(gpu_clock)
    if options.quick:
        features, batches = features[:1], (1, 16, 512)
    rows: list[Row] = []
    for n, k in features:
        for m in batches:
            for op in OPS:
                for row in measure(op, Shape(m, n, k, group_size=128, bias=False), ceilings, clock, device):
                    rows.append(row)
                    print(f"{op:22}{in_words(row)}", flush=True)
            if not (options.quick or options.dry_run):  # a run that is stopped leaves what it has
                write_rows(rows, RESULTS / f"sparse24_{slug(torch.cuda.get_device_name())}.csv")
    print(*goals(rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
