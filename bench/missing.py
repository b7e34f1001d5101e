"""What a table says of a variant that it cannot make here."""

from __future__ import annotations

import importlib.util


class Missing(RuntimeError):
    """A variant that cannot run here, and why."""


def need(package: str) -> None:
    """Raise Missing unless ``package`` can be imported."""
    if importlib.util.find_spec(package) is None:
        raise Missing(f"{package} is not installed")
