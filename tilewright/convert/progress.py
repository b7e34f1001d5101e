"""A progress bar for models with many layers, only where someone is watching, with an estimate of the rest."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import TypeVar

T = TypeVar("T")

#: From how many layers on a bar is shown without being asked for.
MANY_LAYERS = 24


class Rest:
    """How long all phases that are still to come may take, judged by how long those that are done have taken.

    phases: by name, in their order, what each is expected to take, in any unit. A phase of which nobody says how much
    there is counts when it is over.
    """

    def __init__(self, phases: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self._phases, self._clock, self._begun = dict(phases), clock, clock()
        self._done = 0.0

    def reached(self, phase: str, share: float) -> None:
        """So much of a phase is done, 0 to 1, and all of those before it."""
        if phase in self._phases:
            names = list(self._phases)
            before = sum(self._phases[name] for name in names[: names.index(phase)])
            self._done = max(self._done, before + share * self._phases[phase])

    def seconds(self) -> float | None:
        """The estimate; None as long as nothing is done."""
        left = sum(self._phases.values()) - self._done
        return None if not self._done else (self._clock() - self._begun) * left / self._done

    def words(self) -> str:
        """``about 1:05 left``, or nothing."""
        seconds = self.seconds()
        return "" if seconds is None else f"about {int(seconds) // 60}:{int(seconds) % 60:02} left"


@contextlib.contextmanager
def phase(
    description: str,
    total: int | None,
    progress: bool | None = None,
    rest: Rest | None = None,
) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr while this is open; what it gives is called after each of ``total`` steps.

    total: None where nobody knows. progress: True or False shows or hides it; None shows it if there are many, or
    nobody knows how many, and stderr is a terminal. rest: is told how far the phase ``description`` is, and says how
    long the others may take.
    """
    many = total is None or total > MANY_LAYERS
    required = progress if progress is not None else many and sys.stderr.isatty()
    rest = Rest({}) if rest is None else rest
    if not required:
        yield _nothing
        rest.reached(description, 1.0)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rest]}"))
    # A log, unlike a terminal, cannot take the finished bar away again, and would show nothing.
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task, done = bar.add_task(description, total=total, rest=rest.words()), 0

        def advance() -> None:
            nonlocal done
            done += 1
            if total:
                rest.reached(description, min(done / total, 1.0))
            bar.update(task, advance=1, rest=rest.words())

        yield advance
        rest.reached(description, 1.0)
        bar.update(task, rest=rest.words())


def track(
    items: Iterable[T],
    description: str,
    progress: bool | None = None,
    rest: Rest | None = None,
    total: int | None = None,
) -> Iterator[T]:
    """Iterate over ``items`` as the steps of a ``phase``. total: how many items there are, if they do not say so."""
    with phase(description, len(items) if isinstance(items, Sized) else total, progress, rest) as advance:
        for item in items:
            yield item
            advance()


def _nothing() -> None:
    """The step of a phase that is not shown."""
