"""Is it still as fast? Calls of this working tree beside those of an older revision, in turns.

    python -m bench.same --base REV [--check] [--only TEXT ...] [--rounds 24] [--threads N] [--conversion 0.8]

Both packages are copied into a temporary folder, and their C kernels compiled there where they are not up to date:
minutes on two cores. Each side is a process of its own, and the two take turns with a block of one call: first one
side, then the other, the next round the other way round. A block counts by the fastest tenth of its calls, since what
else a machine does only ever adds to their time, and the figure is the median, over the rounds, of the ratio of two
adjacent blocks: above 1 the working tree is faster. A call that seems slower than wanted is measured up to three times
as long. Where others use most of the cores, threads wait for each other, and only ``--threads 1`` tells much. Before a
call is timed its results are compared; those of a convolutional network may differ by more than rounding where the new
ones are nearer to the float network's. ``--check`` ends with status 1 where a ratio is below 0.97; ``--conversion``
asks more of converting MiniLM, namely that it takes at most that share of the old time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from bench.same_worker import CONVERSION, FLOAT, MAKERS
from bench.timer import Busy, Timing

ROOT = Path(__file__).resolve().parents[1]
RATIO = 0.97
#: Largest relative difference of results: of layers, and of networks, in which int8 steps may round the other way.
LAYER_ERROR, NETWORK_ERROR = 1e-3, 0.02
#: Seconds between two blocks, in which the threads of one side come to rest.
REST = 0.02
ATTEMPTS = 3
BUILD = """
import ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location("build_kernels", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
try:
    library = ctypes.CDLL(str(module.LIBRARY))
    library.tw_source_hash.restype = ctypes.c_char_p
    up_to_date = library.tw_source_hash().decode() == module.source_hash()
except (OSError, AttributeError):
    up_to_date = False
if not up_to_date:
    module.build()
"""


class Side(Protocol):
    """One revision: what it answers and how long it takes."""

    def result(self, name: str, of_float: bool = False) -> np.ndarray:
        """Make the call, or that of the float network it stands for, and give its result."""

    def block(self, name: str) -> list[float]:
        """Seconds of each call of a block."""


class Worker:
    """A process that runs ``bench/same_worker.py`` beside the package in ``folder``."""

    def __init__(self, folder: Path, seconds: float, threads: int = 0) -> None:
        self.folder, self.seconds = folder, seconds
        # The package is found in the current folder, before any that is installed.
        start = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        environment = {**os.environ, "TILEWRIGHT_CACHE_DIR": str(folder / "tuned"), "TILEWRIGHT_AUTOTUNE": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, str(ROOT / "bench" / "same_worker.py"), str(threads)],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        about = self._answer()
        self.isa = about["isa"]
        if Path(about["package"]).resolve() != (folder / "tilewright").resolve():
            raise RuntimeError(f"the package was imported from {about['package']}, not from {folder}")

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.folder.name} ended with status {self.process.wait()}")
        return json.loads(line)

    def _ask(self, **request: object) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def result(self, name: str, of_float: bool = False) -> np.ndarray:
        """As ``Side`` says."""
        path = self.folder / "result"
        shape = self._ask(name=name, result=str(path), float=of_float)["shape"]
        return np.fromfile(path, dtype=np.float32).reshape(shape)

    def block(self, name: str) -> list[float]:
        """As ``Side`` says."""
        if name == CONVERSION:
            return self._ask(name=name, seconds=0.0, waking=0, fewest=1)["seconds"]
        return self._ask(name=name, seconds=self.seconds, waking=2, fewest=3)["seconds"]

    def end(self) -> None:
        """Let the process end."""
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Comparison:
    """old, new: seconds by round; wanted: what the median of their ratios is to reach; error: of the results."""

    name: str
    wanted: float
    error: float
    old: list[float] = field(default_factory=list)
    new: list[float] = field(default_factory=list)
    busy: float | None = None

    @property
    def ratios(self) -> Timing:
        """Old over new, by round."""
        return Timing(tuple(old / new for old, new in zip(self.old, self.new, strict=True)))

    @property
    def met(self) -> bool:
        """Whether the working tree is as fast as wanted."""
        return self.ratios.median >= self.wanted

    def row(self) -> str:
        """A line of the table."""
        low, high = self.ratios.quartiles
        cells = [self.name, *(f"{1e3 * statistics.median(values):.3f}" for values in (self.old, self.new))]
        cells += [f"{self.ratios.median:.3f}", f"{low:.3f} to {high:.3f}", str(len(self.old)), f"{self.wanted:.2f}"]
        cells += ["" if self.busy is None else f"{self.busy:.0%}", f"{self.error:.1g}", "yes" if self.met else "NO"]
        return "| " + " | ".join(cells) + " |"


HEADER = "| call | old, ms | new, ms | old / new | quartiles | rounds | wanted | others busy | difference | met |"


def difference(name: str, sides: Mapping[str, Side]) -> float:
    """How far the results are apart, relatively. Raises ValueError where neither rounding nor progress explains it."""
    old, new = sides["old"].result(name), sides["new"].result(name)
    if old.shape != new.shape:
        raise ValueError(f"{name}: the old result has shape {old.shape}, the new one {new.shape}")
    error = float(np.linalg.norm(new - old) / np.linalg.norm(old))
    largest = LAYER_ERROR if "linear" in name else NETWORK_ERROR
    if not error <= largest and not nearer(name, sides):
        raise ValueError(f"{name}: the results differ by {error:.2g}, rounding explains {largest:g}")
    return error


def nearer(name: str, sides: Mapping[str, Side]) -> bool:
    """Whether the network behind a call is one that may change and answers no farther from the float one than before,
    over a whole batch: one image alone may come to lie either way.
    """
    batch = next((call for call in FLOAT if call.split(",")[0] == name.split(",")[0]), None)
    if batch is None:
        return False
    wanted = sides["new"].result(batch, of_float=True)
    errors = {side: float(np.linalg.norm(worker.result(batch) - wanted)) for side, worker in sides.items()}
    return errors["new"] <= errors["old"]


def fastest_tenth(seconds: Sequence[float]) -> float:
    """What a tenth of the calls did not exceed."""
    return sorted(seconds)[len(seconds) // 10]


def compare(name: str, sides: Mapping[str, Side], rounds: int, wanted: float, ours: Sequence[int] = ()) -> Comparison:
    """Time one call on both sides in turns. Raises ValueError where their results differ."""
    found = Comparison(name, wanted, difference(name, sides))
    order, busy = [("old", found.old), ("new", found.new)], Busy(ours)
    for _ in range(ATTEMPTS):
        for _ in range(rounds):
            for side, taken in order:
                taken.append(fastest_tenth(sides[side].block(name)))
                time.sleep(REST)
            order.reverse()
        if found.met:
            break
    found.busy = busy.share()
    return found


def extract(revision: str, folder: Path) -> None:
    """The package as it was at ``revision``. Raises ValueError if git does not know that."""
    archive = subprocess.run(["git", "archive", revision, "tilewright"], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        raise ValueError(f"git has no revision {revision!r} of this package: {archive.stderr.decode().strip()}")
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)


def build(folder: Path) -> None:
    """Compile the C kernels of the package in ``folder`` by its own rules, unless they are up to date."""
    (rules,) = (folder / "tilewright").glob("**/cpu/build.py")
    subprocess.run([sys.executable, "-c", BUILD, str(rules)], check=True)


@contextlib.contextmanager
def workers(revision: str, seconds: float, threads: int = 0) -> Iterator[dict[str, Worker]]:
    """Both sides, built anew. Raises RuntimeError where they do not run on the same instruction set."""
    with tempfile.TemporaryDirectory(prefix="tilewright-same-") as temporary, contextlib.ExitStack() as stack:
        folders = {side: Path(temporary) / side for side in ("old", "new")}
        extract(revision, folders["old"])
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tilewright", folders["new"] / "tilewright", ignore=without)
        sides = {}
        for side, folder in folders.items():
            build(folder)
            sides[side] = Worker(folder, seconds, threads)
            stack.callback(sides[side].end)
        if sides["old"].isa != sides["new"].isa:
            raise RuntimeError(f"the C kernels differ: {sides['old'].isa} before, {sides['new'].isa} now")
        yield sides


def main(arguments: list[str] | None = None) -> int:
    """The command line above; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="REV", help="what git calls the older revision")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="calls whose name contains one of these"
    )
    parser.add_argument(
        "--rounds", type=int, default=24, help="blocks of each side; default: 24, for conversion a third"
    )
    parser.add_argument("--seconds", type=float, default=0.1, help="that a block lasts at least; default: 0.1")
    parser.add_argument(
        "--conversion", type=float, metavar="SHARE", help="of the old time, at most; default: as the rest"
    )
    parser.add_argument("--threads", type=int, default=0, help="of each side; default: as many as PyTorch takes")
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a call is slower than wanted")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured to FILE")
    options = parser.parse_args(arguments)
    names = [name for name in MAKERS if any(text in name for text in options.only)]
    if not names:
        parser.error(f"no call has such a name; the calls are {', '.join(MAKERS)}")
    found = []
    with workers(options.base, options.seconds, options.threads) as sides:
        print(f"{options.base} (old) beside the working tree (new), {sides['new'].isa}\n\n{HEADER}")
        print("|---" * HEADER.count(" | ") + "|---|")
        for name in names:
            wanted = 1 / options.conversion if name == CONVERSION and options.conversion else RATIO
            rounds = max(options.rounds // 3, 1) if name == CONVERSION else options.rounds
            found.append(compare(name, sides, rounds, wanted, [side.process.pid for side in sides.values()]))
            print(found[-1].row(), flush=True)
    if options.json:
        rows = [{**asdict(one), "ratio": one.ratios.median, "met": one.met} for one in found]
        options.json.write_text(json.dumps({"base": options.base, "calls": rows}, indent=1) + "\n", encoding="utf-8")
    return int(options.check and not all(one.met for one in found))


if __name__ == "__main__":
    sys.exit(main())
