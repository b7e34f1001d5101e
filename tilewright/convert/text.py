"""Words for messages: the nearest known name, a list that does not run away."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def closest(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the known name nearest to ``name``, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def nearest(name: str, known: Sequence[str], count: int = 3) -> list[str]:
    """Up to ``count`` known names, nearest first. Never empty unless ``known`` is."""
    return difflib.get_close_matches(name, known, n=count, cutoff=0.0)


def listed(names: Sequence[str], limit: int = 5) -> str:
    """``'a', 'b' and 7 more``."""
    displayed = ", ".join(repr(name) for name in names[:limit])
    return f"{displayed} and {len(names) - limit} more" if len(names) > limit else displayed


def display_name(name: str) -> str:
    """A module's dotted name as a reader sees it; the root module has an empty one."""
    return name or "(root)"


def size(count: float) -> str:
    """Bytes in words: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise ValueError(count)
