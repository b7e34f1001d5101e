"""The table of compiled kernels: what each becomes on each target, as data that a change to a kernel shows up in.

    python -m bench.tables.compiled    compile all, print what differs from the committed table, write the table
        --only TEXT    the same for the rows whose name contains TEXT; the others stay as they are
        --check        only print; exit status 1 if anything differs
        --sample 40    the same for 40 rows spread over the table

All takes about 9 minutes of CPU time, divided among ``--jobs`` processes. Figures that became worse are marked. Needs
no GPU. "compiled" says nothing about results or speed: only what the compiler made, and for sm_80 and sm_90 what
that code does on an emulated GPU (``bench.counts``).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import dataclasses
import functools
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bench.catalogue import Entry, launches_for
from bench.conv_catalogue import conv_launches_for
from bench.counts import count
from tilewright.aot.compiler import Compiled, compile_launch
from tilewright.aot.targets import TARGETS, Target

TABLE = Path(__file__).parents[1] / "results" / "compiled.csv"
Key = tuple[str, str, str, str, str]
T = TypeVar("T")
WORSE = "worse"
#: Figures of which less is better.
BUDGETS = (
    "registers",
    "spills",
    "shared",
    "read_sectors",
    "read_excess",
    "write_excess",
    "shared_excess",
    "matrix_per_step",
    "issue_per_matrix",
)
#: Figures that must not vanish.
NEEDED = ("matrix", "loads_16", "async_copies")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    spills, shared: bytes, for each thread and each block. matrix: kind of matrix instruction, of which there are
    ``matrix_count`` in the code; of sparse ones also what ``ptxas`` made of them, as the machine code names it.
    loads_16: 16-byte loads from global memory. async_copies: ``cp.async`` of any width.
    From ``read_bytes`` on, what was counted on an emulated GPU: see ``counts.Counts``.
    """

    family: str
    kernel: str
    variant: str
    config: str
    target: str
    registers: int
    spills: int
    shared: int
    matrix: str
    matrix_count: int
    loads_16: int
    async_copies: int
    triton: str
    read_bytes: float | None = None
    read_sectors: float | None = None
    read_excess: float | None = None
    write_excess: float | None = None
    shared_excess: float | None = None
    matrix_per_step: float | None = None
    issue_per_matrix: float | None = None

    @property
    def key(self) -> Key:
        """What names the row; the rest is what was found."""
        return self.family, self.kernel, self.variant, self.config, self.target

    def difference(self, new: Row) -> str | None:
        """What ``new`` has otherwise, in words, or None. What became worse is marked."""
        words = []
        for field in dataclasses.fields(self):
            before, after = getattr(self, field.name), getattr(new, field.name)
            if before != after:
                mark = f" ({WORSE})" if field.name in self.worse(new) else ""
                words.append(f"{field.name} {before} -> {after}{mark}")
        return ", ".join(words) or None

    def worse(self, new: Row) -> list[str]:
        """The figures that are worse in ``new``: resources and waste that grew, wide or asynchronous loads and matrix
        instructions that are gone, counts that are no longer to be had.
        """
        found = []
        for name in BUDGETS:
            before, after = getattr(self, name), getattr(new, name)
            if before is not None and (after is None or after > before):
                found.append(name)
        return found + [name for name in NEEDED if getattr(self, name) and not getattr(new, name)]


def _count(text: str) -> float | None:
    return float(text) if text else None


_READ = {
    field.name: {"int": int, "float | None": _count}.get(str(field.type), str) for field in dataclasses.fields(Row)
}


@functools.cache
def entries() -> tuple[tuple[Target, Entry], ...]:
    """Everything the table has a row for."""
    return tuple(
        (target, entry) for target in TARGETS.values() for entry in (*launches_for(target), *conv_launches_for(target))
    )


def sample(everything: Sequence[T], size: int) -> Sequence[T]:
    """``size`` of them at equal distances, so that every family and target has its share."""
    if size >= len(everything):
        return everything
    return [everything[i * len(everything) // size] for i in range(size)]


def _matrix_kinds(compiled: Compiled) -> str:
    kinds = sorted(compiled.instructions.matrix)
    if "mma.sp" in kinds:
        kinds += sorted({".".join(opcode.split(".")[:2]) for opcode in compiled.sass.matrix})
    return " ".join(kinds)


def compute(target: Target, entry: Entry) -> Row:
    """Compile one entry, and count what it does."""
    compiled = compile_launch(entry.launch, target)
    found = compiled.instructions
    return Row(
        *entry.key,
        target=target.name,
        registers=compiled.registers,
        spills=compiled.spill_bytes,
        shared=compiled.shared_bytes,
        matrix=_matrix_kinds(compiled),
        matrix_count=sum(found.matrix.values()),
        loads_16=found.loads.get(16, 0),
        async_copies=found.async_copies,
        triton=compiled.triton_version,
        **dataclasses.asdict(count(entry.small, target)),
    )


def _compute_number(number: int) -> Row | str:
    """Row ``number`` of everything, or what went wrong."""
    target, entry = entries()[number]
    try:
        return compute(target, entry)
    # A compiler may fail in any way; what failed is listed, and the status says so.
    except Exception as error:
        return f"{' | '.join(entry.key)} | {target.name}: {type(error).__name__}: {str(error)[:300]}"


def compute_all(numbers: Sequence[int], jobs: int) -> Iterator[Row | str]:
    """``_compute_number`` of each, in order. A process of its own is worth its start from 50 rows on."""
    jobs = min(jobs, len(numbers) // 50)
    if jobs < 2:
        yield from map(_compute_number, numbers)
        return
    # Not forked: the threads of torch do not survive that.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        yield from pool.map(_compute_number, numbers)


def read_table(path: Path = TABLE) -> dict[Key, Row]:
    """The rows of a table by key; empty where there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        rows = [Row(**{name: _READ[name](text) for name, text in line.items()}) for line in lines]
    return {row.key: row for row in rows}


def write_table(rows: Iterable[Row], path: Path = TABLE) -> None:
    """Write ``rows`` as they come."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        lines.writeheader()
        lines.writerows(dataclasses.asdict(row) for row in rows)


def differences(old: dict[Key, Row], new: Iterable[Row], whole: bool) -> list[str]:
    """Each difference in a line. whole: ``new`` is everything, so that a row it lacks is gone."""
    new = {row.key: row for row in new}
    lines = []
    for key, row in new.items():
        change = old[key].difference(row) if key in old else "new"
        if change is not None:
            lines.append(f"{' | '.join(key)}: {change}")
    if whole:
        lines += [f"{' | '.join(key)}: gone" for key in old if key not in new]
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The command line above; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only, do not write the table")
    parser.add_argument("--sample", type=int, metavar="N", help="compile N rows only and compare them; implies --check")
    parser.add_argument("--only", metavar="TEXT", default="", help="compile only rows whose name contains TEXT")
    parser.add_argument("--jobs", type=int, metavar="N", default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    everything = entries()
    required = [
        number
        for number, (target, entry) in enumerate(everything)
        if options.only in f"{' '.join(entry.key)} {target.name}"
    ]
    chosen = sample(required, options.sample or len(required))
    rows, failed = [], []
    for number, found in enumerate(compute_all(chosen, options.jobs), 1):
        (rows if isinstance(found, Row) else failed).append(found)
        if sys.stderr.isatty():
            print(f"\r{number}/{len(chosen)}", end="", file=sys.stderr)
    table = read_table()
    changed = differences(table, rows, whole=options.sample is None and not options.only)
    print(*changed, sep="\n")
    print(*(f"DOES NOT COMPILE {line}" for line in failed), sep="\n")
    worse = sum(f"({WORSE})" in line for line in changed)
    print(
        f"{len(rows)} rows compiled, {len(changed)} differ from {TABLE.name}, {worse} of them for the worse, "
        f"{len(failed)} do not compile"
    )
    if options.check or options.sample is not None:
        return int(bool(changed or failed))
    if not failed:
        table.update({row.key: row for row in rows})
        order = [(*entry.key, target.name) for target, entry in everything]
        write_table(table[key] for key in order if key in table)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
