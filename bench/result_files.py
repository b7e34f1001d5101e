"""Results as data: a CSV that is whole after every row, a markdown table and a plot made from it."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tilewright.autotune.device import cpu_kind, driver_version, triton_version

#: The folder of results; ``bench/gpu.py`` names another for a dry run.
RESULTS = Path(os.environ.get("TILEWRIGHT_BENCH_RESULTS") or Path(__file__).parent / "results")
PEERS = ("torchao", "onnxruntime", "gemlite", "bitsandbytes")


@dataclass(frozen=True)
class Row:
    """One measurement.

    microseconds: median, operands from memory; of a CUDA-graph replay on a GPU. eager_microseconds: with the host's
    share, on a GPU. speedup: over the first variant at the same shape. of_roofline: the time that the bytes or the
    operations need at ceilings measured in the same run, whichever is longer, over the time taken. error: relative, of
    the output, against float64. note: why there is no time.
    """

    m: int
    n: int
    k: int
    format: str
    variant: str
    microseconds: float | None = None
    eager_microseconds: float | None = None
    speedup: float | None = None
    gigabytes_per_second: float | None = None
    teraops_per_second: float | None = None
    of_roofline: float | None = None
    error: float | None = None
    note: str = ""
    device: str = ""
    driver: str = ""
    versions: str = ""
    date: str = ""


def write_measured(path: Path, rows: Sequence[Mapping[str, object]], kept: Sequence[Mapping[str, object]] = ()) -> None:
    """Write rows of one table on a CPU, each with machine, instruction set, threads, version and date. kept: rows that
    say so already, and come first.
    """
    where = {
        "machine": platform.processor() or platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *where])
        writer.writeheader()
        writer.writerows([*kept, *({**row, **where} for row in rows)])


def about(device: str) -> dict[str, str]:
    """What stands in every row: device, driver, versions, date."""
    if device == "cuda":
        name, driver = torch.cuda.get_device_name(), driver_version()
    else:
        kind = cpu_kind()
        name, driver = f"{kind.name}, {kind.arch}, {torch.get_num_threads()} threads", platform.release()
    packages = [f"torch {torch.__version__}", f"triton {triton_version()}", f"python {platform.python_version()}"]
    for peer in PEERS:
        try:
            packages.append(f"{peer} {version(peer)}")
        except PackageNotFoundError:
            continue
    return {
        "device": name,
        "driver": driver,
        "versions": ", ".join(packages),
        "date": datetime.date.today().isoformat(),
    }


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"\W+", "_", name.lower()).strip("_")


_READ = {field.name: {"int": int, "float | None": float}.get(str(field.type), str) for field in fields(Row)}


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{name: _READ[name](text) if text or _READ[name] is str else None for name, text in line.items()})
            for line in csv.DictReader(file)
        ]


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """``old`` with the rows that were measured anew replaced, and the others added; in order of shape."""
    rows = {(row.n, row.k, row.m, row.variant): row for row in (*old, *new)}
    return sorted(rows.values(), key=lambda row: (row.n * row.k, row.n, row.m))


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Replace the CSV at once: whoever stops the run finds a whole file."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        lines.writeheader()
        lines.writerows(asdict(row) for row in rows)
    partial.replace(path)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.speedup is None:
        return "-"
    return f"{row.speedup:.2f}x ({row.of_roofline:.0%})" if row.of_roofline is not None else f"{row.speedup:.2f}x"


def markdown(rows: Sequence[Row], title: str) -> str:
    """A table for each shape: speed-up, and percent of the roofline, over M."""
    first = rows[0]
    parts = [
        f"# {title}",
        f"{first.device}; driver {first.driver}; {first.versions}; {first.date}.",
        f"Speed-up over {first.variant}, in brackets the share of the roofline that was reached. Medians, operands "
        "from memory, every result checked before it was timed. Made by `python -m bench.tables.peers`.",
    ]
    for n, k in dict.fromkeys((row.n, row.k) for row in rows):
        here = [row for row in rows if (row.n, row.k) == (n, k)]
        batches = list(dict.fromkeys(row.m for row in here))
        base = {row.m: row for row in here if row.variant == first.variant}
        header = ["", *(f"M = {m}" for m in batches)]
        times = [f"{base[m].microseconds:.0f} us" if m in base and base[m].microseconds else "" for m in batches]
        lines = [header, ["---"] * len(header), [first.variant, *times]]
        for variant in dict.fromkeys(row.variant for row in here if row.variant != first.variant):
            cells: Mapping[int, Row] = {row.m: row for row in here if row.variant == variant}
            name = f"**{variant}**" if variant.startswith("Tilewright") else variant
            lines.append([name, *(_cell(cells.get(m)) for m in batches)])
        parts.append(f"## N = {n}, K = {k}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    notes = dict.fromkeys(f"- {row.variant}, M = {row.m}: {row.note}" for row in rows if row.note)
    if notes:
        parts.append("Not measured:\n\n" + "\n".join(notes))
    return "\n\n".join(parts) + "\n"


def plot(
    rows: Sequence[Row], path: Path, rooflines: Mapping[tuple[int, int], Mapping[str, Mapping[int, float]]]
) -> None:
    """Speed-up over M, a panel for each shape; dashed, what each format's roofline allows. Raises ImportError without
    matplotlib.

    rooflines: by shape and format, the speed-up that the format's floor would be at each M.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((row.n, row.k) for row in rows))
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(7 * len(shapes) + 3, 5.5), squeeze=False)
    formats = list(dict.fromkeys(row.format for row in rows))
    colours = {name: f"C{i}" for i, name in enumerate(formats)}
    for panel, (n, k) in zip(panels[0], shapes, strict=True):
        here = [row for row in rows if (row.n, row.k) == (n, k) and row.speedup is not None]
        for place, variant in enumerate(dict.fromkeys(row.variant for row in here)):
            line = [row for row in here if row.variant == variant]
            ours = variant.startswith("Tilewright")
            peer = {"linewidth": 1.0, "marker": "v^<>sDPX*"[place % 9], "markersize": 4, "alpha": 0.6}
            style = {"linewidth": 2.2, "marker": "o"} if ours else peer
            panel.plot(
                [row.m for row in line],
                [row.speedup for row in line],
                color=colours[line[0].format],
                label=variant,
                **style,
            )
        for name, most in rooflines.get((n, k), {}).items():
            panel.plot(list(most), list(most.values()), "--", color=colours.get(name, "grey"), linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xlabel("M, rows of activations")
        panel.set_ylabel(f"speed-up over {rows[0].variant}")
        panel.set_title(f"N = {n}, K = {k}; dashed: roofline of the format")
        panel.grid(True, alpha=0.3)
    # Beside the panels: it has a line for each variant, and would hide theirs.
    panels[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(f"{rows[0].device}, {rows[0].date}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
