"""One piece of work: every contestant is asked for its answer, and those that answer right are timed in turns."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from bench.peers.contestants import EAGER
from bench.peers.work import Work
from bench.timer import Busy, Timing

ROOT = Path(__file__).resolve().parents[2]


class Side(Protocol):
    """A contestant's process."""

    def result(self, work: str) -> np.ndarray | str:
        """Its answer in float32, or in words why there is none."""

    def block(self, work: str) -> list[float]:
        """Seconds of each call of a turn."""


class Worker:
    """A process that runs ``bench.peers.worker``; it starts with the first question."""

    def __init__(self, contestant: str, folder: Path, threads: int, seconds: float) -> None:
        self.contestant, self.folder, self.threads, self.seconds = contestant, folder, threads, seconds
        self.process: subprocess.Popen | None = None
        self.why_ended = ""

    def _start(self) -> subprocess.Popen:
        command = [sys.executable, "-W", "ignore", "-m", "bench.peers.worker"]
        process = subprocess.Popen(
            [*command, self.contestant, str(self.folder), str(self.threads)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "log.txt").open("a"),
            text=True,
        )
        process.stdout.readline()
        return process

    def _ask(self, **request: object) -> dict:
        """Raises BrokenPipeError if the process has ended."""
        if self.process is None:
            self.process = self._start()
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise BrokenPipeError(f"its process ended with status {self.process.wait()}")
        return json.loads(line)

    def result(self, work: str) -> np.ndarray | str:
        """As ``Side`` says."""
        if self.why_ended:
            return self.why_ended
        path = self.folder / "result"
        try:
            found = self._ask(work=work, result=str(path))
        except BrokenPipeError as error:
            self.why_ended = str(error)
            return self.why_ended
        return found["missing"] if "missing" in found else np.fromfile(path, dtype=np.float32).reshape(found["shape"])

    def block(self, work: str) -> list[float]:
        """As ``Side`` says."""
        return self._ask(work=work, seconds=self.seconds)["seconds"]

    def count(self, work: str) -> dict[str, int]:
        """What ``bench.peers.floor.Counts`` has, of work that was answered before."""
        return self._ask(work=work, count=True)

    @property
    def pid(self) -> int | None:
        """None before it has started."""
        return None if self.process is None else self.process.pid

    def end(self) -> None:
        """Let the process end."""
        if self.process is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()


@contextlib.contextmanager
def workers(names: Sequence[str], folder: Path, threads: int, seconds: float) -> Iterator[dict[str, Worker]]:
    """A process for each contestant, ended afterwards."""
    found = {name: Worker(name, folder, threads, seconds) for name in names}
    try:
        yield found
    finally:
        for worker in found.values():
            worker.end()


@dataclass
class Result:
    """Of one contestant. seconds: by round. error: relative, against float32 eager. note: why there is no time."""

    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    note: str = ""

    def over(self, other: Result) -> Timing:
        """By round, the time of ``other`` over that of this."""
        return Timing(tuple(theirs / own for theirs, own in zip(other.seconds, self.seconds, strict=True)))


def check(answer: np.ndarray | str, expected: np.ndarray, bound: float) -> Result:
    """What is to be said of an answer before it is timed."""
    if isinstance(answer, str):
        return Result(note=answer)
    if answer.shape != expected.shape:
        return Result(note=f"wrong: it answers {list(answer.shape)}, not {list(expected.shape)}")
    difference = answer.astype(np.float64) - expected
    error = float(np.linalg.norm(difference) / np.linalg.norm(expected))
    note = "" if error <= bound else f"wrong: it is off by {error:.2g}, and its format explains {bound:g}"
    return Result(error=error, note=note)


def fastest_tenth(seconds: Sequence[float]) -> float:
    """What a tenth of the calls did not exceed."""
    return sorted(seconds)[len(seconds) // 10]


def contest(
    work: Work, sides: Mapping[str, Side], rounds: int, pids: Callable[[], Sequence[int | None]] = list
) -> tuple[dict[str, Result], float | None]:
    """By contestant what was found, and the share of the cores that others used meanwhile. Raises RuntimeError if
    float32 eager itself does not answer.

    A turn counts by the fastest tenth of its calls, since what else a machine does only adds to their time. Each round
    begins with another contestant.
    """
    expected = sides[EAGER].result(work.name)
    if isinstance(expected, str):
        raise RuntimeError(f"{work.name}: there is nothing to compare with: {expected}")
    found = {EAGER: Result(error=0.0)}
    for name in work.contestants:
        if name != EAGER:
            found[name] = check(sides[name].result(work.name), expected, work.bound(name))
    timed = [name for name, result in found.items() if not result.note]
    busy = Busy([pid for pid in pids() if pid is not None])
    for number in range(rounds):
        first = number % len(timed)
        for name in timed[first:] + timed[:first]:
            found[name].seconds.append(fastest_tenth(sides[name].block(work.name)))
    return found, busy.share()
