"""What this CPU does at most, measured in at most two seconds and kept beside the table of what was timed on it.

    from tilewright.kernels.cpu import peaks

    found = peaks.measure()                 # or peaks.stored(), of an earlier measurement
    found.products("int8")                  # operations a second with all threads, by the best instruction set
    found.products("float32", "avx2", 1)    # by one, on one thread
    found.bandwidth("memory")               # bytes read a second
    found.region                            # seconds of a parallel region in which nothing is done

``tilewright doctor --measure`` measures and keeps it. No compiler is needed: the loops are in the library of the C
kernels, one for each instruction set.
"""

from __future__ import annotations

import datetime
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tilewright.autotune import racing, tables
from tilewright.autotune.clock import CpuClock
from tilewright.autotune.device import DeviceKind, cpu_kind
from tilewright.autotune.folders import cpu_tables_off
from tilewright.autotune.store import Entry, add_entries, read_or_set_aside
from tilewright.kernels.cpu import build, native
from tilewright.kernels.cpu.memory import cache_bytes

#: What is multiplied, by the numbers of peak.c.
DTYPES = {"float32": 0, "bfloat16": 1, "int8": 3}
MEMORY = "memory"
#: Seconds of one run, of which the best of ``RUNS`` counts, and of the whole measurement.
SECONDS, RUNS, BUDGET = 0.0015, 5, 1.8
#: Of one thread: what is read to measure a cache fills half of it.
_FILLED = 0.5
_LEAST_MEMORY, _MOST_MEMORY = 64 << 20, 512 << 20
#: Seconds that the first runs may take, which wake the threads and the wide registers.
_WAKING = 0.02


@dataclass(frozen=True)
class Peaks:
    """One measurement of a CPU.

    threads: of PyTorch when it was measured; everything was measured with one thread, too. figures: operations a second
    by "instruction set dtype threads" (a product and its addition are two), bytes read a second by "level threads" with
    the levels "L1", "L2", "L3" and "memory". region: seconds of an empty parallel region of all threads. spread: the
    largest distance between the quartiles of a figure's runs, as a share of their median. doubt: why the figures may be
    too low, or None. date: of the measurement.
    """

    threads: int
    figures: Mapping[str, float]
    region: float
    spread: float = 0.0
    doubt: str | None = None
    date: str = ""

    def products(self, dtype: str, isa: str | None = None, threads: int | None = None) -> float:
        """Operations a second in ``dtype`` ("float32", "bfloat16", "int8"); isa: by default the fastest that was
        measured. 0.0 where nothing was.
        """
        isas = self.isas if isa is None else [isa]
        rates = [self.figures.get(f"{each} {dtype} {threads or self.threads}", 0.0) for each in isas]
        return max(rates, default=0.0)

    def bandwidth(self, level: str = MEMORY, threads: int | None = None) -> float:
        """Bytes read a second from ``level``; 0.0 where it was not measured."""
        return self.figures.get(f"{level} {threads or self.threads}", 0.0)

    @property
    def isas(self) -> list[str]:
        """Instruction sets whose products were measured, best first."""
        known = {name.partition(" ")[0] for name in self.figures}
        return [isa for isa in build.ISAS if isa in known]

    @property
    def levels(self) -> list[str]:
        """Caches and memory whose reading was measured, from the core outwards."""
        return [name.partition(" ")[0] for name in self.figures if name.endswith(" 1") and name.count(" ") == 1]


class _Runs:
    """Best rates of runs, and how far they spread."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.end, self.spread = now, now() + BUDGET, 0.0

    def best(self, run: Callable[[int], int]) -> float:
        """Amount a second of the best run. run: does its work so many times and returns how much that was."""
        count, took, done = 1, 0.0, 0
        while True:
            begin = self.now()
            done = run(count)
            took = self.now() - begin
            if took >= SECONDS / 2 or not done:
                break
            count = max(2 * count, int(count * SECONDS / max(took, 1e-7) / 2))
        if not done:
            return 0.0
        rates = [done / took]
        while len(rates) < RUNS and (len(rates) < 3 or self.now() < self.end):
            begin = self.now()
            done = run(count)
            rates.append(done / (self.now() - begin))
        low, middle, high = statistics.quantiles(rates, n=4, method="inclusive")
        self.spread = max(self.spread, (high - low) / middle)
        return max(rates)


def measure(now: Callable[[], float] = time.perf_counter) -> Peaks:
    """Measure this CPU with one thread and with as many as ``torch.get_num_threads()``: products by every instruction
    set that it has, reading from each cache and from memory, an empty parallel region. Takes up to two seconds and half
    a GiB. The best of some runs counts: whatever else the machine does only lowers a rate. Where other processes used
    more than a tenth of the cores meanwhile, or runs spread by more than half, ``doubt`` says so.

    Raises RuntimeError where there are no C kernels.
    """
    if reason := native.why_no_native():
        raise RuntimeError(reason)
    threads, disturbed, runs = torch.get_num_threads(), CpuClock().watch(), _Runs(now)
    waking = now() + _WAKING
    while now() < waking:
        native.function("peak_products")(DTYPES["float32"], 1000, threads)
    figures = {name: rate for name, run in _loops(threads) if (rate := runs.best(run))}
    regions = native.function("peak_regions")

    def begin_regions(count: int) -> int:
        regions(count, threads)
        return count

    region = 1 / runs.best(begin_regions)
    doubt = disturbed()
    if doubt is None and runs.spread > racing.MOST_SPREAD:
        doubt = f"runs spread by {runs.spread:.0%}"
    return Peaks(threads, figures, region, runs.spread, doubt, _today())


def _loops(threads: int) -> Iterator[tuple[str, Callable[[int], int]]]:
    """Each figure's name and its loop, done so many times."""
    counts = sorted({1, threads})
    for isa in build.isas():
        if isa != "portable" and native.supports(isa):
            multiply = native.function("peak_products", isa)
            for dtype, number in DTYPES.items():
                for each in counts:
                    yield f"{isa} {dtype} {each}", functools.partial(_multiplied, multiply, number, each)
    read = native.function("peak_read")
    sizes = _sizes(threads)
    buffer = torch.ones(
        max(size * (threads if shared else 1) for size, shared in sizes.values()) + 64, dtype=torch.uint8
    )
    address = -(-buffer.data_ptr() // 64) * 64
    for level, (size, each_own) in sizes.items():
        for each in counts:
            part = size if each_own else size // each // 512 * 512

            def run(count: int, part: int = part, each: int = each, kept: object = buffer) -> int:
                return read(address, part, count, each)

            yield f"{level} {each}", run


def _multiplied(multiply: Callable[..., int], dtype: int, threads: int, count: int) -> int:
    return multiply(dtype, 64 * count, threads)


def _sizes(threads: int) -> dict[str, tuple[int, bool]]:
    """What is read to measure each level: bytes, and whether each thread has so many of its own or all share them."""
    own = {level: cache_bytes(level) for level in (1, 2)}
    found = {f"L{level}": (int(_FILLED * size) // 512 * 512, True) for level, size in own.items() if size}
    inner, last = (own[2] or own[1] or 0) * threads, cache_bytes(3)
    if last and last > 2 * inner:
        # Not half of it: on a server it is shared with others, and large.
        found["L3"] = (int(min(_FILLED * last, 4 * max(inner, 1 << 20))) // 512 * 512, False)
    size = min(max(2 * (last or inner), _LEAST_MEMORY), _MOST_MEMORY)
    return {**found, MEMORY: (size // 512 * 512, False)}


# ---- kept
def path() -> Path:
    """The file of measurements of this CPU: beside the table of what was timed on it."""
    return tables.table_path(_device()).with_suffix(tables.MEASURED)


def _device() -> DeviceKind:
    return cpu_kind("" if native.why_no_native() else native.isa())


def _key(threads: int) -> str:
    """Of one measurement: it holds for a number of threads, a build of PyTorch and one of the C kernels."""
    return tables.key_of("cpu.peaks", {"threads": threads}, _device().driver, build.source_hash())


def store(found: Peaks) -> bool:
    """Keep a measurement for ``stored``; False, having written nothing, where it is doubted or
    ``TILEWRIGHT_CPU_TABLE=off``. Raises OSError where the file cannot be written.
    """
    if found.doubt is not None or cpu_tables_off():
        return False
    config = {**found.figures, "region": found.region, "spread": found.spread}
    entry: Entry = {"config": config, "date": found.date}
    add_entries(path(), _device(), {_key(found.threads): entry})
    return True


def stored() -> Peaks | None:
    """The measurement that is kept for this CPU, the threads that PyTorch uses now, PyTorch and the C kernels as they
    are; None if there is none, and with ``TILEWRIGHT_CPU_TABLE=off``.
    """
    if cpu_tables_off():
        return None
    threads = torch.get_num_threads()
    entry = read_or_set_aside(path()).get(_key(threads))
    if entry is None:
        return None
    config = {name: value for name, value in entry["config"].items() if isinstance(value, (int, float)) and value > 0}
    region, spread = config.pop("region", None), config.pop("spread", 0.0)
    if region is None or not config:  # a file of ours that somebody wrote into
        return None
    return Peaks(threads, config, region, spread, None, str(entry.get("date", "")))


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
