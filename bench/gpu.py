"""One command for a machine with a GPU: is it right, and how fast is it.

    python bench/gpu.py --minutes 8            or: python -m bench.gpu
    python bench/gpu.py --dry-run              the same on a machine without one, as far as that goes

Runs the tests marked ``gpu``, then the tables in order of importance: int4 at the sizes that decide, int8, the other
formats, then everything beside every peer. After each step the files in bench/results/ are whole, so it may be stopped
at any time, and what was measured is there. Needs torch 2.9, Triton 3.4 and pytest, no network and no git history.

With --dry-run the tables' kernels run in Triton's interpreter, and a sample of them compiled on an emulated GPU: every
step but the time is what a GPU will see. The files then go to a folder of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # called by its path
    sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "bench" / "results"
SMALL, MIDDLE, LARGE = ("1", "16", "32", "64"), ("128", "256", "512"), ("1024", "2048", "8192")


@dataclass(frozen=True)
class Step:
    """name; command: arguments of Python; share: of the time that is left when it starts, at most."""

    name: str
    command: tuple[str, ...]
    share: float = 1.0


def _table(
    name: str, shapes: Sequence[str], batches: Sequence[str], variants: Sequence[str], share: float, file: str = ""
) -> Step:
    flags = [flag for shape in shapes for flag in ("--shape", shape)]
    output = ("--name", file) if file else ()
    return Step(name, ("-m", "bench.tables.peers", *flags, "--m", *batches, "--variants", *variants, *output), share)


def _tuning(shapes: Sequence[str], seconds: int) -> Step:
    """Time configurations for the decisive sizes; what is found lies beside the tables, in ``tuned/``. On sm_90 only
    those of the short list that comes with the package (``make shortlist``) are timed.
    """
    flags = [flag for shape in shapes for flag in ("--shape", shape)]
    ops = ("int4_linear", "int8_linear")
    command = ("-m", "tilewright", "tune", "--op", *ops, *flags, "--m", "1,16,64,128")
    return Step("tuning", (*command, "--seconds", str(seconds)), 0.5)


def steps() -> list[Step]:
    """In order of importance: what is cut off by the clock is what matters least."""
    ours = ("Tilewright",)
    decisive = ("4096x4096", "8192x8192", "28672x4096", "16384x16384")
    return [
        Step("correctness", ("-m", "pytest", "tests", "-m", "gpu", "-q", "--maxfail=20"), 0.45),
        _table("int4, small batches", decisive, SMALL, ("Tilewright int4",), 0.4),
        _table("int8, small batches", decisive, SMALL, ("Tilewright int8",), 0.4),
        _tuning(decisive[:2], 150),
        _table(
            "tuned", decisive[:2], ("1", "16", "64", "128"), ("Tilewright int4", "Tilewright int8"), 0.4, "linear_tuned"
        ),
        _table("all formats, middle batches", decisive, MIDDLE, ours, 0.5),
        _table("all formats, large batches", decisive, LARGE, (*ours, "_int_mm"), 0.5),
        Step("convolutions beside cuDNN", ("-m", "bench.tables.conv_layers", "--minutes", "5"), 0.4),
        Step("2:4", ("-m", "bench.tables.sparse24_gpu"), 0.5),
        _table("every peer", decisive[:3:2], ("1", "16", "64", "256", "2048"), ("",), 1.0),
    ]


def dry_steps() -> list[Step]:
    """What can be done of it without a GPU."""
    return [
        Step(
            "the tests are found", ("-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "--collect-only", "-p", "no:xdist")
        ),
        Step("kernels in the interpreter", ("-m", "bench.dry_run", "interpret")),
        Step("kernels on the emulated GPU", ("-m", "bench.dry_run", "emulate")),
        Step("the short list", ("-m", "pytest", "tests/aot/test_short_list.py", "-q", "-rs", "-p", "no:xdist")),
        Step("convolutions on this CPU", ("-m", "bench.tables.conv_layers", "--device", "cpu", "--batch", "1")),
        Step("2:4 on this CPU", ("-m", "bench.tables.sparse24_gpu", "--dry-run")),
        Step(
            "tables on this CPU",
            (
                "-m",
                "bench.tables.peers",
                "--device",
                "cpu",
                "--shape",
                "256x256",
                "--m",
                "1",
                "--variants",
                "Tilewright",
            ),
        ),
    ]


class Runner:
    """Runs steps one after another within a time, and keeps a summary that is whole after each."""

    def __init__(self, output: Path, minutes: float, environment: dict[str, str]) -> None:
        self.output, self.end = output, time.monotonic() + 60 * minutes
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TILEWRIGHT_BENCH_RESULTS": str(output),
            # Not what somebody tuned before: the heuristics are measured first.
            "TILEWRIGHT_CACHE_DIR": str(output / "tuned"),
            **environment,
        }
        self.done: list[dict[str, object]] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False

    def stop(self, number: int, frame: FrameType | None) -> None:
        """On a signal: end the step that runs, start no other."""
        self.stopped = True
        if self.process is not None:
            self.process.terminate()

    def run(self, step: Step) -> None:
        """One step, ended when its share of the time is over."""
        left = self.end - time.monotonic()
        if self.stopped or left < 1:
            self._note(step, "not started: stopped" if self.stopped else "not started: the time was over", 0.0)
            return
        begin, log = time.monotonic(), self.output / f"{step.name.replace(' ', '_').replace(',', '')}.log"
        print(f"== {step.name}: at most {step.share * left:.0f} s", flush=True)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *step.command], cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT
            )
            try:
                status = self.process.wait(step.share * left)
                result = "done" if status == 0 else f"status {status}"
            except subprocess.TimeoutExpired:
                self.process.terminate()
                try:
                    self.process.wait(10)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()
                result = "its share of the time was over"
            if self.stopped:
                result = "stopped"
            self.process = None
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        print("\n".join(lines[-12:]), flush=True)
        self._note(step, result, time.monotonic() - begin, lines[-1] if lines else "")

    def _note(self, step: Step, result: str, seconds: float, last: str = "") -> None:
        self.done.append({"step": step.name, "result": result, "seconds": round(seconds, 1), "last_line": last[:300]})
        partial = self.output / "gpu_run.json.partial"
        partial.write_text(json.dumps(self.done, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.output / "gpu_run.json")


def main(arguments: list[str] | None = None) -> int:
    """The command line above; returns 0 if every step was done, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; default: 8")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: interpreter and emulator")
    parser.add_argument("--skip-tests", action="store_true", help="tables only")
    parser.add_argument("--output", type=Path, help="default: bench/results, of a dry run a temporary folder")
    options = parser.parse_args(arguments)
    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("no GPU here: torch.cuda.is_available() is False (--dry-run does what can be done without)")
            return 1
    output = options.output or (Path(tempfile.mkdtemp(prefix="tilewright-dry-")) if options.dry_run else RESULTS)
    output.mkdir(parents=True, exist_ok=True)
    runner = Runner(output.resolve(), options.minutes, {})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, runner.stop)
    for step in dry_steps() if options.dry_run else steps()[1 if options.skip_tests else 0 :]:
        runner.run(step)
    print(f"== results in {output}", flush=True)
    for one in runner.done:
        print(f"{one['step']:32}{one['result']:40}{one['seconds']:8} s")
    return int(any(one["result"] != "done" for one in runner.done))


if __name__ == "__main__":
    sys.exit(main())
