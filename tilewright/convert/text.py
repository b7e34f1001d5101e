"""Words for messages: the nearest known name, a list that does not run away, many names as one pattern."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


def closest(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the known name nearest to ``name``, or nothing if none is near.

    Upper case, hyphens and underscores make no name another one.
    """
    plain = {_plain(each): each for each in reversed(list(known))}
    near = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
    return f", did you mean {plain[near[0]]!r}?" if near else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def listed(names: Sequence[str], limit: int = 5) -> str:
    """``'a', 'b' and 7 more``."""
    displayed = ", ".join(repr(name) for name in names[:limit])
    return f"{displayed} and {len(names) - limit} more" if len(names) > limit else displayed


def display_name(name: str) -> str:
    """A module's dotted name as a reader sees it; the root module has an empty one."""
    return name or "(root)"


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Names -> reasons turned around: the names, as a reader sees them, of which a reason is told."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(display_name(name))
    return found


def name_patterns(names: Iterable[str], among: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ in numbers alone, as one pattern: ``layer.*.query`` -> its names, in their order.

    A pattern matches no other name of ``among``: where a ``*`` would, the numbers are written out, as in
    ``layer.{0,2-5}.query``.
    """
    names = list(dict.fromkeys(names))
    shapes: dict[tuple[str, ...], list[list[str]]] = {}
    others: dict[tuple[str, ...], list[list[str]]] = {}
    for found, group in ((shapes, names), (others, set(among) - set(names))):
        for name in group:
            parts = name.split(".")
            found.setdefault(tuple("*" if _is_number(part) else part for part in parts), []).append(parts)
    return {
        pattern: [".".join(parts) for parts in matched]
        for shape, group in shapes.items()
        for pattern, matched in _patterns(group, others.get(shape, []))
    }


def _patterns(names: list[list[str]], others: list[list[str]]) -> list[tuple[str, list[list[str]]]]:
    values = [list(dict.fromkeys(column)) for column in zip(*names, strict=True)]
    several = [len(found) > 1 for found in values]
    if not any(
        all(many or part in found for part, many, found in zip(o, several, values, strict=True)) for o in others
    ):
        return [(".".join("*" if many else found[0] for many, found in zip(several, values, strict=True)), names)]
    if not any(all(part in found for part, found in zip(other, values, strict=True)) for other in others):
        return [(".".join(_ranges(found) if len(found) > 1 else found[0] for found in values), names)]
    first = several.index(True)
    parts = [[name for name in names if name[first] == value] for value in values[first]]
    return [pattern for part in parts for pattern in _patterns(part, others)]


def _is_number(part: str) -> bool:
    return part.isdecimal() and part == str(int(part))


def _ranges(numbers: list[str]) -> str:
    """``{0,2-5}``."""
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"


def size(count: float) -> str:
    """Bytes in words: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise ValueError(count)


def percent(share: float) -> str:
    """A share in words: ``96 %``, and ``0.3 %`` where whole numbers would say 0."""
    return f"{100 * share:.0f} %" if share >= 0.01 or not share else f"{100 * share:.1g} %"
