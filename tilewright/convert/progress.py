"""A progress bar for models with many layers, only where someone is watching."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

#: From how many layers on a bar is shown without being asked for.
MANY_LAYERS = 24


def track(items: Iterable[T], description: str, progress: bool | None = None) -> Iterator[T]:
    """Iterate over ``items`` with a progress bar on stderr.

    progress: True or False shows or hides it; None shows it if there are many, or nobody knows how many, and stderr is
    a terminal.
    """
    many = not isinstance(items, Sized) or len(items) > MANY_LAYERS
    required = progress if progress is not None else many and sys.stderr.isatty()
    if not required:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    # A log, unlike a terminal, cannot take the finished bar away again, and would show nothing.
    yield from rich_track(items, description, console=console, transient=console.is_terminal)
