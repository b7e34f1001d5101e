"""Linear layers on a GPU beside what a user would have without them: time, and distance from what the chip can do.

    python -m bench.gpu                  all operators and shapes; writes bench/results/gpu_<device>.csv
    python -m bench.gpu --quick          M = 1, 64 and 1024 of the first shape
    python -m bench.gpu --ops int4_linear int8_linear
    python -m bench.sparse24_gpu         2:4 against dense, cuSPARSELt and int4, every implementation of them

Every result is compared with the definition before it is timed. Calls are replayed from a CUDA graph, so that the
host's share is not in the time, each after a write of twice the L2 cache, so that weights come from memory; times are
medians of CUDA events. Ceilings are measured in the same run: bytes by a copy, float operations by cuBLAS on a large
bfloat16 product, integer ones by ``torch._int_mm``.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.problems import SPARSE, Shape, dense_weight, make_arguments, reference
from tilewright.kernels.problem import Problem, device_facts
from tilewright.kernels.router import route

RESULTS = Path(__file__).parent / "results"
OPS = ("int8_linear", "int8_linear_quantized", "int8_weight_only_linear", "int4_linear", "int4_int8_linear", *SPARSE)
BATCHES = (1, 16, 64, 256, 1024, 4096)
FEATURES = ((4096, 4096), (28672, 4096))
INTEGER = ("int8_linear", "int8_linear_quantized", "int4_int8_linear", "sparse24_int8_linear")


@dataclass(frozen=True)
class Row:
    """One measurement.

    speedup: against F.linear in bfloat16 at the same shape. of_ceiling: the time that the bytes or the operations need
    at the measured ceilings, whichever is longer, over the time taken.
    """

    op: str
    implementation: str
    m: int
    n: int
    k: int
    microseconds: float
    speedup: float
    gigabytes_per_second: float
    teraops_per_second: float
    of_ceiling: float
    device: str
    torch: str
    triton: str
    date: str


@dataclass(frozen=True)
class Ceilings:
    """Measured on this device: bytes, bfloat16 operations and int8 operations for each second."""

    bytes: float
    float_ops: float
    int_ops: float

    def shortest(self, moved: int, operations: int, integer: bool) -> float:
        """Seconds that nothing on this device can go below."""
        return max(moved / self.bytes, operations / (self.int_ops if integer else self.float_ops))


def seconds(run: Callable[[], Any], flush: torch.Tensor, budget: float = 0.15) -> float:
    """Median time of ``run`` with ``flush`` overwritten before each call: at least 7, for about ``budget`` seconds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles and repacks, which a capture must not
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times: list[float] = []
    while len(times) < 7 or (sum(times) < budget and len(times) < 50):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure_ceilings(flush: torch.Tensor) -> Ceilings:
    """A copy of 1 GiB, and products of 8192 x 8192 x 8192 on random data."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds(lambda: target.copy_(source), flush)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    floats = 2 * 8192**3 / seconds(lambda: a @ a, flush)
    q = torch.randint(-127, 128, (8192, 8192), dtype=torch.int8, device="cuda")
    integers = 2 * 8192**3 / seconds(lambda: torch._int_mm(q, q.t()), flush)
    return Ceilings(copy, floats, integers)


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
        few = dict(arguments)
        for name in ("x", "x_scale"):
            if name in few:
                few[name] = few[name][m_part]
        for name in ("weight", "weight_packed", "weight_values", "weight_meta", "weight_scale", "bias"):
            if few.get(name) is not None:
                few[name] = few[name][n_part]
        few = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in few.items()}
        expected = reference(op)(**few).double()
        error = (found[m_part, n_part].cpu().double() - expected).square().mean().sqrt()
        if not error <= expected.square().mean().sqrt() / 64:
            raise ValueError(f"{op}: RMS error {error:.3g} where the result is {expected.square().mean().sqrt():.3g}")


def plain_linear_seconds(op: str, arguments: dict[str, Any], flush: torch.Tensor) -> float:
    """Time of cuBLAS on the dequantised weight in bfloat16, which is gone again afterwards."""
    dense = dense_weight(op, arguments).to(torch.bfloat16)
    x = torch.randn(arguments["x"].shape, dtype=torch.bfloat16, device="cuda")
    return seconds(lambda: F.linear(x, dense), flush)


def measure(op: str, shape: Shape, ceilings: Ceilings, flush: torch.Tensor) -> Iterator[Row]:
    """Rows for the plain layer, for ``torch._int_mm`` where it applies, and for the operator."""
    arguments = make_arguments(op, shape)
    arguments = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    m, n, k = shape.m, shape.n, shape.k
    operations, out_bytes = 2 * m * n * k, 2
    baseline = plain_linear_seconds(op, arguments, flush)

    def row(name: str, time: float, moved: int, integer: bool) -> Row:
        return Row(
            op,
            name,
            m,
            n,
            k,
            microseconds=round(time * 1e6, 2),
            speedup=round(baseline / time, 3),
            gigabytes_per_second=round(moved / time / 1e9, 1),
            teraops_per_second=round(operations / time / 1e12, 2),
            of_ceiling=round(ceilings.shortest(moved, operations, integer) / time, 3),
            device=torch.cuda.get_device_name(),
            torch=torch.__version__,
            triton=triton_version(),
            date=datetime.date.today().isoformat(),
        )

    yield row("F.linear bfloat16", baseline, (m * k + n * k + m * n) * 2, integer=False)
    if op == "int8_linear_quantized" and m > 16:
        a, b = arguments["x"], arguments["weight"]
        time = seconds(lambda: torch._int_mm(a, b.t()), flush)
        yield row("torch._int_mm to int32", time, m * k + n * k + 4 * m * n, integer=True)
    facts = device_facts(torch.device("cuda", torch.cuda.current_device()))
    if "group_size" in arguments:
        facts = {**facts, "group_size": arguments["group_size"], "scale_dtype": arguments["weight_scale"].dtype}
    implementation = route(Problem(op, m, n, k, arguments["x"].dtype, **facts)).implementation
    run = getattr(torch.ops.tilewright, op)
    assert_near_definition(op, arguments, run(**arguments))
    moved = bytes_moved(arguments, n, out_bytes)
    yield row(implementation.name, seconds(lambda: run(**arguments), flush), moved, op in INTEGER)


def triton_version() -> str:
    """Of the Triton that is installed."""
    import triton

    return triton.__version__


def main(arguments: list[str] | None = None) -> int:
    """The command line above; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU here: torch.cuda.is_available() is False")
        return 1
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(2 * l2, dtype=torch.uint8, device="cuda")
    ceilings = measure_ceilings(flush)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton_version()}, measured ceilings:")
    print(f"{ceilings.bytes / 1e12:.2f} TB/s copied, {ceilings.float_ops / 1e12:.0f} TFLOP/s in bfloat16,", end=" ")
    print(f"{ceilings.int_ops / 1e12:.0f} TOP/s in int8")
    print(f"{'':62}{'us':>10}{'speedup':>9}{'GB/s':>9}{'TOP/s':>9}{'ceiling':>9}")
    rows = []
    for op in options.ops:
        for n, k in FEATURES[: 1 if options.quick else None]:
            for m in (1, 64, 1024) if options.quick else BATCHES:
                for row in measure(op, Shape(m, n, k, group_size=128, bias=False), ceilings, flush):
                    rows.append(row)
                    print(in_words(row))
    write(rows, RESULTS / f"gpu_{slug(torch.cuda.get_device_name())}.csv")
    return 0


def in_words(row: Row) -> str:
    """A line of the printed table."""
    what = f"{row.op:24}{row.implementation[:24]:25}{row.m:5} x{row.n:6}"
    rates = f"{row.gigabytes_per_second:9.0f}{row.teraops_per_second:9.1f}{row.of_ceiling:9.0%}"
    return f"{what}{row.microseconds:10.1f}{row.speedup:8.2f}x{rates}"


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def write(rows: list[Row], path: Path) -> None:
    """Write the measurements."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        lines.writeheader()
        lines.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
