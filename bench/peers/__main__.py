"""Tilewright beside what others make of the same float model on this CPU, and what was aimed at.

    python -m bench.peers [--only TEXT ...] [--rounds 8] [--threads 2] [--isa ISA] [--again] [--output FILE]

writes peers.csv, peers.md and peers.png in bench/results. ONNX Runtime, OpenVINO with NNCF, llama.cpp in the wheel
xllamacpp and torch.compile with torchao each run in a process of their own with ``--threads`` threads, as fast as they
can be set up: shapes known when a model is compiled, OpenVINO's latency hint, ONNX Runtime's fusions, Inductor's
max-autotune with frozen weights. float32 stays float32; where the processor has bfloat16, OpenVINO's int8 also runs
with it. The wheel of llama.cpp is built for AVX2.

An answer that is further from float32 than its format explains is reported and not timed. Those that are right take
turns, while the threads of all others rest. Rows that are there already stay unless ``--again`` is given, and the files
are whole after each piece of work, so a run can be stopped and continued. What is not installed is missing from the
table with that reason: ``pip install -c constraints-dev.txt -e '.[peers]'`` installs all of them.

``--isa`` holds Tilewright, PyTorch and OpenVINO to fewer instructions than the processor has, by the settings of their
libraries, and writes peers_ISA.csv. ONNX Runtime has no such setting and multiplies int8 with what there is.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench import isas
from bench.peers import floor, table, turns
from bench.peers.contestants import CONTESTANTS, EAGER
from bench.peers.floor import Counts, Peaks
from bench.peers.work import WORK, Work
from bench.result_files import RESULTS

PACKAGES = ("onnxruntime", "openvino", "nncf", "xllamacpp", "torchao", "transformers")


def about(threads: int) -> dict[str, str]:
    """Machine, versions and date, as in every row. threads: of each contestant."""
    from tilewright.autotune.device import cpu_kind
    from tilewright.kernels.cpu import native

    versions = [f"torch {torch.__version__}", f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    kind = cpu_kind()
    return {
        "device": f"{kind.name}, {native.why_no_native() or native.isa()}, {threads} threads",
        "versions": ", ".join(versions),
        "date": datetime.date.today().isoformat(),
    }


def rows_of(
    work: Work,
    found: Mapping[str, turns.Result],
    counts: Counts,
    peaks: Peaks,
    busy: float | None,
    where: Mapping[str, str],
) -> list[table.Row]:
    """What a contest found, as rows."""
    rows = []
    for name, result in found.items():
        one = CONTESTANTS[name]
        rows.append(
            table.Row(
                work.name,
                name,
                tuple(1e3 * value for value in result.seconds),
                result.error,
                1e3 * floor.seconds(counts, one.format, peaks) if one.ours else None,
                result.note,
                busy,
                peaks=peaks.words(),
                **where,
            )
        )
    return rows


def run(chosen: Sequence[Work], output: Path, rounds: int, seconds: float, threads: int) -> None:
    """Measure work model by model; what a model needs is prepared once."""
    torch.set_num_threads(threads)
    where, peaks = about(threads), floor.measure(threads)
    print(f"{where['device']}; {peaks.words()}\n\n{table.targets([])}", flush=True)
    for _, group in itertools.groupby(chosen, key=lambda work: work.model):
        together = list(group)
        peaks = floor.highest(peaks, floor.measure(threads))
        names = tuple(name for name in CONTESTANTS if any(name in work.contestants for work in together))
        with (
            tempfile.TemporaryDirectory(prefix="tilewright-peers-") as folder,
            turns.workers(names, Path(folder), threads, seconds) as sides,
        ):
            for work in together:
                found, busy = turns.contest(work, sides, rounds, lambda: [side.pid for side in sides.values()])
                new = rows_of(work, found, Counts(**sides[EAGER].count(work.name)), peaks, busy, where)
                table.save(table.merge(table.read(output.with_suffix(".csv")), new), output)
                print("\n".join(table.targets(new).splitlines()[2:]), flush=True)
                for row in new:
                    if row.note:
                        print(f"  {row.contestant}: {row.note}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line above; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="work whose name has one of these")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each contestant; default: 8")
    parser.add_argument("--seconds", type=float, default=0.25, help="that a turn lasts at least; default: 0.25")
    parser.add_argument("--threads", type=int, default=2, help="of each contestant; default: 2")
    parser.add_argument("--isa", choices=isas.LIBRARIES, help="the most that Tilewright, oneDNN and MKL may use")
    parser.add_argument("--again", action="store_true", help="also measure what the files have already")
    parser.add_argument("--output", type=Path, help="without a suffix; default: bench/results/peers, or peers_ISA")
    options = parser.parse_args(arguments)
    if options.isa:  # read by the libraries when they are first used, here and in the processes that start
        isas.hold(options.isa)
    output = options.output or RESULTS / (f"peers_{options.isa}" if options.isa else "peers")
    chosen = [work for work in WORK.values() if any(text in work.name for text in options.only)]
    if not chosen:
        parser.error(f"no work has such a name; there is {'; '.join(WORK)}")
    if not options.again:
        done = {row.work for row in table.read(output.with_suffix(".csv"))}
        chosen = [work for work in chosen if work.name not in done]
    chosen.sort(key=lambda work: list(dict.fromkeys(one.model for one in WORK.values())).index(work.model))
    if chosen:
        run(chosen, output, options.rounds, options.seconds, options.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
