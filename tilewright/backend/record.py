"""What the backend did to each graph it was given: kept for ``compile_report``, and logged.

``TORCH_LOGS=tilewright`` shows it while a program runs.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass, field

from tilewright.convert.text import by_reason, display_name, listed

logger = logging.getLogger("tilewright.backend")

#: Graphs whose reports are kept; older ones are dropped.
MOST_REPORTS = 64


@dataclass(frozen=True)
class Rewrite:
    """kind: "convolution", "linear", "norm" or "epilogue". layer: dotted name. what: in words."""

    kind: str
    layer: str
    what: str


@dataclass
class GraphReport:
    """One graph. rewrites: in the order they were made. left: layer -> why it is as it was. notes: anything else."""

    rewrites: list[Rewrite] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, layer: str, what: str) -> None:
        """Note a rewrite."""
        self.rewrites.append(Rewrite(kind, layer, what))
        self.left.pop(layer, None)

    def count(self, kind: str) -> int:
        """Rewrites of one kind."""
        return sum(rewrite.kind == kind for rewrite in self.rewrites)

    def __str__(self) -> str:
        kinds = Counter(rewrite.kind for rewrite in self.rewrites)
        summary = ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "nothing rewritten"
        lines = [f"graph: {summary}; {len(self.left)} layers left alone"]
        lines += [f"  {rewrite.kind:<12} {display_name(rewrite.layer)}: {rewrite.what}" for rewrite in self.rewrites]
        lines += [f"  left alone   {listed(names, 3)}: {reason}" for reason, names in by_reason(self.left).items()]
        return "\n".join([*lines, *(f"  note         {note}" for note in self.notes)])


_reports: deque[GraphReport] = deque(maxlen=MOST_REPORTS)


def keep(report: GraphReport) -> None:
    """Remember the report of a graph, and log it."""
    _reports.append(report)
    logger.info("%s", report)


def compile_report() -> list[GraphReport]:
    """What ``backend="tilewright"`` did to the graphs compiled so far in this process, the oldest first.

    One model may have several: one for each graph break, and one for each set of shapes or modes that was compiled.
    """
    return list(_reports)


def forget_reports() -> None:
    """Empty ``compile_report``."""
    _reports.clear()
