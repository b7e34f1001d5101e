"""The classes of drop-in modules by name, as checkpoints name them: each that says which operator it calls."""

from __future__ import annotations

from typing import Any

_KINDS: dict[str, type[Any]] = {}


def register(kind: type[Any]) -> None:
    """Make a class known by its name. Of two classes with one name the first counts, but for one that is made anew."""
    known = _KINDS.setdefault(kind.__name__, kind)
    if (known.__module__, known.__qualname__) == (kind.__module__, kind.__qualname__):
        _KINDS[kind.__name__] = kind


def registered_kinds() -> dict[str, type[Any]]:
    """All classes by name, in the order of the names."""
    return dict(sorted(_KINDS.items()))
