"""What was found, as a CSV that is whole after every piece of work, and the Markdown and the chart made from it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench.peers.work import WORK, Target
from bench.timer import Timing

#: Where the floor forbids a target, this share of it is to be reached.
SHARE = 0.85
#: A target is not judged where others used more of the cores, or the quartiles of the ratio are further apart.
BUSY, SPREAD = 0.1, 0.2


@dataclass(frozen=True)
class Row:
    """One contestant at one piece of work. milliseconds: by round, none where ``note`` says why. error: relative,
    against float32. floor: milliseconds that nothing can go below in its format, of ours. busy: share of the cores that
    others used.
    """

    work: str
    contestant: str
    milliseconds: tuple[float, ...]
    error: float | None
    floor: float | None
    note: str
    busy: float | None
    device: str
    peaks: str
    versions: str
    date: str


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " ".join(f"{one:.5g}" for one in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(rows: Sequence[Row], path: Path) -> None:
    """Replace the CSV at once: whoever stops the run finds a whole file."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        lines.writeheader()
        lines.writerows({name: _text(value) for name, value in asdict(row).items()} for row in rows)
    partial.replace(path)


def read(path: Path) -> list[Row]:
    """The rows of a CSV, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [_row(line) for line in csv.DictReader(file)]


def _row(line: Mapping[str, str]) -> Row:
    numbers = {name: float(line[name]) if line[name] else None for name in ("error", "floor", "busy")}
    times = tuple(map(float, line["milliseconds"].split()))
    return Row(**{**line, **numbers, "milliseconds": times})  # type: ignore[arg-type]


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """``old`` without the rows of work that was measured anew, and the new ones; in the order of the work."""
    anew = {row.work for row in new}
    order = {name: place for place, name in enumerate(WORK)}
    rows = [*(row for row in old if row.work not in anew), *new]
    return sorted(rows, key=lambda row: order.get(row.work, len(order)))


@dataclass(frozen=True)
class Judgement:
    """A target and what came of it. ratio: by round, the time of ``against`` over ours; None where one has no time."""

    work: str
    target: Target
    ours: Row | None
    against: Row | None
    ratio: Timing | None

    @property
    def share(self) -> float | None:
        """Of the floor, reached by our time."""
        if self.ours is None or not self.ours.milliseconds or self.ours.floor is None:
            return None
        return self.ours.floor / Timing(self.ours.milliseconds).median

    @property
    def verdict(self) -> str:
        """Whether the target is met, in words where there is more to say than yes or no."""
        if self.ratio is None or self.ours is None or self.against is None:
            return "not measured"
        if self.ours.busy is not None and self.ours.busy > BUSY:
            return "not judged: others were busy"
        if self.ratio.spread > SPREAD:
            return "not judged: rounds differ"
        if self.ratio.median >= self.target.wanted:
            return "yes"
        allowed = Timing(self.against.milliseconds).median / self.target.wanted
        # A floor that was gone below is none: the weights stayed in a cache.
        if self.ours.floor is not None and self.ours.floor > allowed and (self.share or 0) <= 1:
            return f"the floor forbids it; {SHARE:.0%} of that " + (
                "reached" if (self.share or 0) >= SHARE else "missed"
            )
        return "no"


def judge(rows: Sequence[Row]) -> list[Judgement]:
    """Every target of the work that ``rows`` are about: against the fastest of those that it names."""
    found = {(row.work, row.contestant): row for row in rows}
    judgements = []
    for name in dict.fromkeys(row.work for row in rows if row.work in WORK):
        for target in WORK[name].targets:
            ours = found.get((name, target.ours))
            others = [found[name, one] for one in target.against if (name, one) in found]
            timed = [row for row in others if row.milliseconds]
            against = min(timed, key=lambda row: Timing(row.milliseconds).median, default=None)
            ratio = None
            if ours is not None and ours.milliseconds and against is not None:
                pairs = zip(against.milliseconds, ours.milliseconds, strict=True)
                ratio = Timing(tuple(theirs / own for theirs, own in pairs))
            judgements.append(Judgement(name, target, ours, against, ratio))
    return judgements


def _ms(row: Row | None) -> str:
    return f"{Timing(row.milliseconds).median:.3g}" if row is not None and row.milliseconds else "-"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "work",
    "ours, ms",
    "fastest of the others, ms",
    "ratio",
    "quartiles",
    "target",
    "met",
    "floor, ms",
    "reached",
)


def targets(rows: Sequence[Row]) -> str:
    """The table of targets."""
    lines = [_line(HEADER), "|---" * len(HEADER) + "|"]
    for one in judge(rows):
        low, high = one.ratio.quartiles if one.ratio is not None else (0.0, 0.0)
        lines.append(
            _line(
                [
                    one.work,
                    f"{_ms(one.ours)} ({one.target.ours.removeprefix('Tilewright ')})",
                    f"{_ms(one.against)} ({one.against.contestant if one.against else ', '.join(one.target.against)})",
                    "-" if one.ratio is None else f"{one.ratio.median:.2f}",
                    "-" if one.ratio is None else f"{low:.2f} to {high:.2f}",
                    f"{one.target.wanted:g}",
                    one.verdict,
                    "-" if one.ours is None or one.ours.floor is None else f"{one.ours.floor:.3g}",
                    "-" if one.share is None else f"{one.share:.0%}",
                ]
            )
        )
    return "\n".join(lines)


def everything(rows: Sequence[Row]) -> str:
    """Every contestant that was timed."""
    lines = [_line(["work", "contestant", "ms", "error", "others busy"]), "|---" * 5 + "|"]
    for row in rows:
        if row.milliseconds:
            busy = "" if row.busy is None else f"{row.busy:.0%}"
            lines.append(_line([row.work, row.contestant, _ms(row), f"{row.error or 0:.2g}", busy]))
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """The whole page."""
    if not rows:
        return ""
    parts = ["# Beside other runtimes"]
    for where in dict.fromkeys((row.device, row.peaks, row.versions, row.date) for row in rows):
        parts.append("; ".join(filter(None, where)) + ".")
    parts += [
        "Made by `python -m bench.peers`, which says how. Times are medians, over the rounds, of the fastest tenth of "
        "the calls of a turn; ratios are taken round by round: above 1 ours is faster. The floor is the longer of "
        "products at the measured peak and bytes at the measured bandwidth of memory.",
        targets(rows),
        "## Every time",
        everything(rows),
    ]
    notes = [f"- {row.work}, {row.contestant}: {row.note}" for row in rows if row.note]
    if notes:
        parts += ["## Not timed", "\n".join(notes)]
    return "\n\n".join(parts) + "\n"


def chart(rows: Sequence[Row], path: Path) -> None:
    """How near each target is: a bar for the ratio, a mark for what was wanted. Raises ImportError without
    matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [one for one in judge(rows) if one.ratio is not None]
    if not shown:
        return
    figure, panel = pyplot.subplots(figsize=(10, 1 + 0.28 * len(shown)))
    places = range(len(shown), 0, -1)
    ratios = [one.ratio.median for one in shown if one.ratio is not None]
    colours = {"yes": "C2", "no": "C3"}
    panel.barh(places, ratios, color=[colours.get(one.verdict, "0.6") for one in shown], height=0.7)
    panel.scatter([one.target.wanted for one in shown], places, marker="|", s=120, color="black", zorder=3)
    panel.axvline(1.0, color="black", linewidth=0.8)
    labels = [f"{one.work}: {one.target.ours} / {one.against.contestant}" for one in shown if one.against is not None]
    panel.set_yticks(list(places), labels, fontsize=7)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("their time over ours; the mark is the target; grey: not judged")
    panel.set_title(f"{rows[0].device}, {rows[0].date}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def save(rows: Sequence[Row], output: Path) -> None:
    """CSV, Markdown and, with matplotlib, a chart; ``output`` has no suffix."""
    write(rows, output.with_suffix(".csv"))
    output.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    try:
        chart(rows, output.with_suffix(".png"))
    except ImportError:
        print("no chart: matplotlib is not installed")
