"""What conversions still get wrong: hazards that random networks are drawn without, and programs that must fail."""

from __future__ import annotations

#: Hazards that random networks must not hold yet.
WITHOUT: tuple[str, ...] = ()
#: Programs of ``found`` that fail, with the cause.
FAILING: dict[tuple[str, str], str] = {}
