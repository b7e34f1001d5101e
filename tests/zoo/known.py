"""What is known to fail, with the cause: by architecture and recipe, the checks that do. What works must leave here."""

from __future__ import annotations

from tests.zoo.checks import RECIPES

#: Names of architectures, names of recipes ("*" for all), the check, and why it fails.
KNOWN: tuple[tuple[str, str, str, str], ...] = (
    ("mobilenet_v1 mobilenet_v2", "int8-calibrated", "call", "one scale for channels of very different size"),
)

EXPECTED: dict[tuple[str, str], dict[str, str]] = {}
for names, kinds, check, cause in KNOWN:
    for name in names.split():
        for kind in RECIPES if kinds == "*" else kinds.split():
            EXPECTED.setdefault((name, kind), {})[check] = cause
