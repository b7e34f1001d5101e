"""What converting a model to int8 with calibration data takes, beside an older revision of this package.

    python -m bench.tables.conversion --base REV [--models NAME ...] [--rounds 3] [--csv FILE] [--append]

ResNet-50 and DenseNet-121 (``bench.picture_networks``), with random weights and batch-norm statistics of random
images, are calibrated with 8 images of 224 x 224 in one batch and with 32 in four; all-MiniLM-L6-v2 with 32 sentences
in four batches. What the environment does not have is left out, with a line that says so.

The older revision is built in a temporary folder, which takes minutes, or found where it has been checked out. Each
side is a process with one thread, and does not time candidates at the end (``tune=``), which is no conversion. The two
take turns, and a figure is the least of their rounds: of the wall clock, and of processor time, which says more where a
machine is shared. Both sides' models then answer the same inputs, and the signal over error in dB against the float
model is beside the time: a faster conversion must not be a worse one.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import result_files, same
from bench.conversion_worker import MODELS, ROOT

WORKER = ROOT / "bench" / "conversion_worker.py"


class Side:
    """The process of one revision, whose package lies in ``folder``."""

    def __init__(self, folder: Path, name: str) -> None:
        start = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", start, str(WORKER), name],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder), "OMP_WAIT_POLICY": "passive", "TILEWRIGHT_CPU_TABLE": "off"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        package = Path(self._answer()["package"])
        if package.resolve() != (folder / "tilewright").resolve():
            raise RuntimeError(f"the package was imported from {package}, not from {folder}")

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"a process ended with status {self.process.wait()}")
        return dict(json.loads(line))

    def convert(self) -> dict[str, Any]:
        """Seconds of wall clock and processor, and the signal over error in dB."""
        self.process.stdin.write("\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self._answer()

    def end(self) -> None:
        """Let the process end."""
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def compare(name: str, folders: dict[str, Path], rounds: int) -> dict[str, object]:
    """A row of the table."""
    sides = {side: Side(folder, name) for side, folder in folders.items()}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    try:
        for number in range(rounds):
            for side in sorted(sides, reverse=bool(number % 2)):
                found[side].append(sides[side].convert())
    finally:
        for side in sides.values():
            side.end()
    row: dict[str, object] = {"model": name}
    for clock in ("wall", "processor"):
        least = {side: min(each[clock] for each in found[side]) for side in found}
        row |= {f"old_{clock}_s": f"{least['old']:.2f}", f"new_{clock}_s": f"{least['new']:.2f}"}
        row[f"{clock}_ratio"] = f"{least['new'] / least['old']:.3f}"
    return row | {
        f"{side}_sqnr_db": f"{statistics.median(each['decibels'] for each in found[side]):.2f}"
        for side in ("old", "new")
    }


def revision(base: str) -> str:
    """``base``, or what git calls the revision in a folder of that name."""
    if not Path(base).is_dir():
        return base
    command = ["git", "-C", base, "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="REV", help="what git calls the older revision, or its folder")
    parser.add_argument(
        "--models", nargs="+", default=[""], metavar="NAME", help="those whose name contains one of these"
    )
    parser.add_argument("--rounds", type=int, default=3, help="conversions of each side; default: 3")
    parser.add_argument("--append", action="store_true", help="keep rows of the file that are not measured anew")
    parser.add_argument("--csv", type=Path, default=result_files.RESULTS / "conversion.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as both sides do, which the rows say
    rows = []
    with tempfile.TemporaryDirectory(prefix="tilewright-conversion-") as temporary:
        given = Path(options.base)
        folders = {"old": given.resolve() if given.is_dir() else Path(temporary) / "old", "new": ROOT}
        if not given.is_dir():
            same.extract(options.base, folders["old"])
        for folder in folders.values():
            same.build(folder)
        for name, (package, _) in MODELS.items():
            if not any(text in name for text in options.models):
                continue
            if importlib.util.find_spec(package) is None:
                print(f"{name}: left out, there is no {package}")
                continue
            rows.append({"base": revision(options.base), **compare(name, folders, options.rounds)})
            print(rows[-1], flush=True)
    kept = []
    if options.append and options.csv.is_file():
        with options.csv.open(newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if row["model"] not in {each["model"] for each in rows}]
    result_files.write_measured(options.csv, rows, kept)


if __name__ == "__main__":
    main()
