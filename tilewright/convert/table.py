"""Tables of text that fit a terminal: a name breaks at dots alone, and what is told elsewhere is left out first."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

GAP = "  "
#: Columns of words may be as wide as this where there is not room for all.
WORDS = 24


@dataclass(eq=False)
class Column:
    """cells: one for each row. kind: "name" breaks at dots, "words" at spaces, "number" not, and stands to the right.
    rank: columns of a higher one are left out first, those above 1 before a name breaks further than it must; that of
    rank 0 never is.
    """

    title: str
    cells: list[str]
    kind: str = "number"
    rank: int = 0
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.width = max(map(len, [self.title, *self.cells]))

    def shrink(self, width: int) -> None:
        """Be no wider than ``width``, or than the longest piece that does not break."""
        pieces = [piece for cell in [self.title, *self.cells] for piece in self._pieces(cell)]
        self.width = min(self.width, max(width, *map(len, pieces), 0))

    def _pieces(self, cell: str) -> list[str]:
        if self.kind == "name":
            return re.split(r"(?<=\.)", cell)
        return cell.split(" ") if self.kind == "words" else [cell]

    def lines(self, cell: str) -> list[str]:
        """The cell in lines of ``width``."""
        if self.kind == "words":
            return wrapped(cell, self.width)
        lines = [""]
        for piece in self._pieces(cell):
            if lines[-1] and len(lines[-1]) + len(piece) > self.width:
                lines.append("")
            lines[-1] += piece
        return [line.rjust(self.width) if self.kind == "number" else line for line in lines]


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of no more than ``width``, unless a single word is longer; all but the first begin with ``indent``."""
    lines = textwrap.wrap(text, max(width, 1), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines] or [""]


def fit(columns: Sequence[Column], width: int) -> tuple[list[str], list[str]]:
    """The table in lines, the header first, and the titles of what was left out for want of room."""
    shown = list(columns)

    def excess(most: int | None = None) -> int:
        counted = [column.width for column in shown if most is None or column.rank <= most]
        return sum(counted) + len(GAP) * (len(counted) - 1) - width

    def shrink(kind: str, width: int | None = None) -> None:
        for column in shown:
            if column.kind == kind and excess() > 0:
                column.shrink(column.width - excess() if width is None else width)

    shrink("words", WORDS)
    if excess(most=1) > 0:
        shrink("name", width * 2 // 5)
    for least in (1, 0):
        while excess() > 0 and (last := max(shown, key=lambda column: column.rank)).rank > least:
            shown.remove(last)
        shrink("words")
        shrink("name")
    lines = []
    for row in zip(*([column.title, *column.cells] for column in shown), strict=True):
        cells = [column.lines(cell) for column, cell in zip(shown, row, strict=True)]
        for number in range(max(map(len, cells))):
            parts = [each[number] if number < len(each) else "" for each in cells]
            lines.append(GAP.join(p.ljust(c.width) for p, c in zip(parts, shown, strict=True)).rstrip())
    return lines, [column.title for column in columns if column not in shown]
