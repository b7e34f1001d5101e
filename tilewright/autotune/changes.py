"""Who wants to know when a tuned choice may have changed: caches of what was chosen."""

from __future__ import annotations

from collections.abc import Callable

_listeners: list[Callable[[], None]] = []


def when_changed(clear: Callable[[], None]) -> None:
    """Have ``clear`` called whenever a table or the mode changes."""
    _listeners.append(clear)


def changed() -> None:
    """Tell all who asked."""
    for clear in _listeners:
        clear()
