"""The README's table and chart: a sentence encoder in four formats, from one run on this machine.

    python -m bench.tables.readme [--rounds 8] [--write]

The model is all-MiniLM-L6-v2 with the sentences of ``examples/minilm_demo.py``: fp32 as it came, int8 and w4a8 with
calibration data, int4 with a scale and a zero point for each 32 weights. Each is timed in a process of its own, and
the processes take turns. ``--write`` puts chart and table between their marks into README.md, the table with its
conditions into docs/measured.md, and the chart into docs/images/minilm.svg.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import tilewright as tw
from bench.timer import Busy
from examples import minilm_demo as demo
from tilewright.autotune.device import cpu_kind
from tilewright.kernels.cpu import native

ROOT = Path(__file__).resolve().parents[2]
MARKS = re.compile(r"(<!-- minilm: begin -->\n).*?(<!-- minilm: end -->)", re.DOTALL)
RECIPES = ("int8", "int4-g32", "w4a8-g32")
CALIBRATED = ("int8", "w4a8-g32")
BATCHES = (32, 1)
PICTURE = "![Latency and size of all-MiniLM-L6-v2 in four formats](docs/images/minilm.svg)"


@dataclass(frozen=True)
class Row:
    """One format. bytes: of the converted layers. seconds: of each call, by batch size, round by round. cosine: of the
    sentences' embeddings with the original's, mean.
    """

    name: str
    bytes: int
    seconds: dict[int, list[list[float]]]
    cosine: float

    def milliseconds(self, batch: int) -> float:
        """The median of all calls."""
        return 1e3 * statistics.median(value for values in self.seconds[batch] for value in values)


def measure(rounds: int) -> tuple[list[Row], int, int]:
    """The rows, the number of converted layers, and the tokens of a sentence at batch 32."""
    original, tokenize, _ = demo.load_encoder()
    sentences = sorted(demo.read_sentences(demo.HERE / "sentences.txt"), key=len)
    batches = demo.batches_of(sentences, tokenize)
    calibration = demo.batches_of(demo.read_sentences(demo.HERE / "calibration_sentences.txt"), tokenize)
    models = {"fp32": original}
    for recipe in RECIPES:
        data = calibration if recipe in CALIBRATED else None
        models[recipe] = tw.convert_model(original, recipe, calibration_data=data, progress=False)
    layers = demo.converted_layers(original, models["int4-g32"])
    embeddings = {name: demo.embed(model, batches) for name, model in models.items()}
    figures = {
        name: demo.compare(name, model, layers, embeddings["fp32"], embeddings[name]) for name, model in models.items()
    }
    timed = {size: tokenize(demo.middle(sentences, size)) for size in BATCHES}
    seconds: dict[str, dict[int, list[list[float]]]] = {name: {size: [] for size in BATCHES} for name in models}
    with tempfile.TemporaryDirectory() as saved:
        for name in RECIPES:
            tw.save_model(models[name], f"{saved}/{name}")
        folders = {"fp32": None, **{name: f"{saved}/{name}" for name in RECIPES}}
        with demo.workers(folders) as workers:
            for size in BATCHES:
                for taken in demo.timed_rounds(workers, timed[size], rounds):
                    for name, values in taken.items():
                        seconds[name][size].append(values)
    rows = [Row(name, figures[name].layer_bytes, seconds[name], figures[name].cosine_mean) for name in models]
    return rows, len(layers), timed[32]["input_ids"].shape[1]


def table(rows: Sequence[Row], layers: int, tokens: int) -> str:
    """Four rows; what speaks of speed is over the first."""
    fp32 = rows[0]
    lines = [
        f"| all-MiniLM-L6-v2 | its {layers} linear layers | batch 32 x {tokens} tokens | batch 1 | cosine with fp32 |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.name, f"{row.bytes / 1e6:.1f} MB"]
        if row is not fp32:
            cells[-1] += f" ({row.bytes / fp32.bytes:.2f}x)"
        for batch in BATCHES:
            taken, before = row.milliseconds(batch), fp32.milliseconds(batch)
            cells.append(f"{taken:.1f} ms" + ("" if row is fp32 else f" (**{before / taken:.1f}x**)"))
        lines.append("| " + " | ".join([*cells, f"{row.cosine:.4f}"]) + " |")
    return "\n".join(lines) + "\n"


def ranges(rows: Sequence[Row]) -> str:
    """How far the speed-up of a round, of which each is a block of calls of all in turn, differs from the next."""
    said = []
    for row in rows[1:]:
        for batch in BATCHES:
            pairs = zip(rows[0].seconds[batch], row.seconds[batch], strict=True)
            each = [statistics.median(before) / statistics.median(after) for before, after in pairs]
            said.append(f"{row.name} at batch {batch} {min(each):.1f}x to {max(each):.1f}x")
    return ", ".join(said)


def processor() -> str:
    """The name of this CPU, what of it the C kernels use, and the threads."""
    names = re.findall(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE) or [platform.processor()]
    return f"{names[0]} ({native.isa() or cpu_kind().arch}), {torch.get_num_threads()} threads"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def commit() -> str:
    """The commit that is checked out, with a plus where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def conditions(busy: float | None) -> str:
    """Processor, versions, date and commit of this run."""
    today, load = datetime.date.today().isoformat(), "" if busy is None else f"; others used {busy:.0%} of the cores"
    return f"{processor()}; PyTorch {torch.__version__}, Python {platform.python_version()}; {today}, {commit()}{load}"


# ---- the chart
LEFT, WIDTH, BAR, GAP = 104, 240, 18, 8
COLOURS = {"fp32": "#8a8f98", "int8": "#2f6fde", "int4-g32": "#2a9d6f", "w4a8-g32": "#8a5bd1"}


def chart(rows: Sequence[Row]) -> str:
    """Bars of the latency at batch 32 and of the size, as SVG: no library is needed to draw it, nor to compare two."""
    panels = (
        ("Latency, batch 32, ms", [(row.name, row.milliseconds(32)) for row in rows]),
        ("Linear layers, MB", [(row.name, row.bytes / 1e6) for row in rows]),
    )
    height = 44 + len(rows) * (BAR + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="780" height="{height}" viewBox="0 0 780 {height}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img" aria-label="Latency and size by format">',
        f'<rect width="780" height="{height}" rx="6" fill="#ffffff"/>',
    ]
    for number, (title, bars) in enumerate(panels):
        left = LEFT + number * 390
        most = max(value for _, value in bars)
        parts.append(f'<text x="{left}" y="24" font-weight="600" fill="#24292f">{title}</text>')
        for place, (name, value) in enumerate(bars):
            y = 36 + place * (BAR + GAP)
            length, middle = max(WIDTH * value / most, 1), y + BAR - 5
            parts += [
                f'<text x="{left - 8}" y="{middle}" text-anchor="end" fill="#24292f">{name}</text>',
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2" fill="{COLOURS[name]}"/>',
                f'<text x="{left + length + 6:.1f}" y="{middle}" fill="#24292f">{value:.1f}</text>',
            ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def put(path: Path, text: str) -> None:
    """Replace what is between the marks of a page."""
    page = path.read_text(encoding="utf-8")
    if not MARKS.search(page):
        raise ValueError(f"{path.name} has no marks for the table")
    path.write_text(MARKS.sub(lambda found: found[1] + text + found[2], page), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="blocks of calls of each format; default: 8")
    parser.add_argument("--write", action="store_true", help="into README.md, docs/measured.md and docs/images")
    options = parser.parse_args(arguments)
    busy = Busy()
    rows, layers, tokens = measure(options.rounds)
    made, about = table(rows, layers, tokens), conditions(busy.share())
    print(f"{made}\n{about}\nspeed-up by round: {ranges(rows)}")
    if options.write:
        short = f"{processor()}, PyTorch {torch.__version__}, {datetime.date.today().isoformat()}; medians, eager mode."
        put(ROOT / "README.md", f"{PICTURE}\n\n{made}\n{short}\n")
        measured = (
            f"{about}. {options.rounds} rounds in turns, medians of all calls, eager mode. By round, the speed-up"
        )
        put(ROOT / "docs" / "measured.md", f"{made}\n{measured} is: {ranges(rows)}.\n")
        (ROOT / "docs" / "images").mkdir(exist_ok=True)
        (ROOT / "docs" / "images" / "minilm.svg").write_text(chart(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
