"""What other processes do while something is timed: figures of a busy machine are worth less."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


class Busy:
    """What other processes did since this was made: figures of a busy machine are worth less.

    ours: further processes that are not other ones, nor are children that have ended.
    """

    def __init__(self, ours: Sequence[int] = ()) -> None:
        self.ours = ours
        self.begun = self._read()

    def share(self) -> float | None:
        """Of all cores, 0 to 1; None where the system does not say, or no time has passed."""
        now = self._read()
        if self.begun is None or now is None or now[1] <= self.begun[1]:
            return None
        used, passed = (after - before for after, before in zip(now, self.begun, strict=True))
        return min(max(used / passed, 0.0), 1.0)

    def _read(self) -> tuple[float, float] | None:
        """Seconds of all cores together: those that others used, and those that have passed."""
        try:
            words = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
            processes = [Path(f"/proc/{pid}/stat").read_text(encoding="utf-8") for pid in (os.getpid(), *self.ours)]
        except OSError:
            return None
        # The name of a process, in parentheses, may hold anything; 11 fields after it are user and system time, then
        # those of its children that have ended.
        own = sum(int(word) for text in processes for word in text.rpartition(")")[2].split()[11:15])
        user, nice, system, idle, waiting, *interrupts = map(int, words)
        used = user + nice + system + sum(interrupts)
        ticks = os.sysconf("SC_CLK_TCK")
        return (used - own) / ticks, (used + idle + waiting) / ticks
