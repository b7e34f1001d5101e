"""``tilewright tune``: find the fastest kernels for the layers of a converted model, before it is used.

    tilewright tune small/ --m 1,16,64,512                         time them on this machine's GPU, or its CPU
    tilewright tune small/ --offline --target sm_90 -o short.json  compile them all for a chip that is not here
    tilewright tune small/ --shortlist short.json                  time only what the list keeps
    tilewright tune --op int4_linear --shape 4096x4096 --group-size 128 --m 1,16

The folder is one that ``tilewright.save_model`` wrote. What is found goes to the user's table: ``tilewright cache``.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tilewright import autotune
from tilewright.aot.targets import TARGETS
from tilewright.autotune import tables
from tilewright.convert.checkpoint import MODULES
from tilewright.convert.manifest import read_manifest
from tilewright.kernels import tuning
from tilewright.kernels.problem import Problem, device_facts
from tilewright.nn import QuantizedLinear

#: Of a chip of each target (A100, L40S, H200, B200, MI300X): the heuristics count them.
MULTIPROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148, "gfx942": 304}
OPS = ("int8_linear", "int8_weight_only_linear", "int4_linear", "int4_int8_linear")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Asked = tuple[autotune.Tunable, Problem]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folder", nargs="?", type=Path, help="a folder that save_model wrote")
    parser.add_argument("--m", type=_batches, default=(1, 16, 64, 512), help="rows of activations, e.g. 1,16,64,512")
    parser.add_argument("--op", choices=OPS, nargs="+", help="operators instead of a model")
    parser.add_argument("--shape", type=_shape, action="append", default=[], metavar="NxK", help="of the operator")
    parser.add_argument("--group-size", type=int, default=128, help="of int4 weights; default: 128")
    parser.add_argument("--dtype", choices=DTYPES, help="of the activations; default: the layer's, or bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU, if there is one")
    parser.add_argument("--seconds", type=float, default=600.0, help="for everything together; default: 600")
    parser.add_argument("--offline", action="store_true", help="compile for --target and write a short list")
    parser.add_argument("--target", choices=TARGETS, default="sm_90", help="default: sm_90")
    parser.add_argument("-o", "--output", type=Path, help="the short list; default: shortlist-<target>.json")
    parser.add_argument("--shortlist", type=Path, help="time only what this list keeps")


def _batches(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1,16,64,512") from error
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"a batch has at least one row, not {min(found)}")
    return found


def _shape(text: str) -> tuple[int, int]:
    try:
        n, k = (int(part) for part in text.lower().split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 4096x14336 (output x input features)") from error
    if min(n, k) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has an empty side")
    return n, k


def run(options: argparse.Namespace, console: Console | None = None) -> int:
    """Run the command; returns the exit status. What the user got wrong raises ValueError or OSError."""
    console = console or Console()
    if options.offline:
        return _prune(options, console)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no GPU can be used here; --offline compiles for one that is elsewhere")
    facts = device_facts(torch.device(device, 0) if device == "cuda" else torch.device(device))
    asked = _kernels(_problems(options, facts, console), implementations=True)
    if not asked:
        console.print("nothing to tune: one implementation serves every layer, and it has no configurations")
        return 0
    short = None if options.shortlist is None else autotune.ShortList(options.shortlist)
    return _time(asked, short, options.seconds, console)


def _problems(options: argparse.Namespace, facts: dict[str, Any], console: Console) -> list[Problem]:
    """Each problem of the model or of the operator once, for every batch, on the device of ``facts``."""
    found: list[Problem] = []
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    if options.folder is not None:
        skipped = set()
        for name, layer in read_manifest(options.folder).layers.items():
            made = MODULES[layer.module](**layer.config, device="meta") if layer.module in MODULES else None
            if isinstance(made, QuantizedLinear):
                found += [made.problem(m, dtype) for m in options.m]
            else:
                skipped.add(name)
        if skipped:
            console.print(
                f"{len(skipped)} convolutions are left out: the sizes of images are not in the checkpoint. Run the "
                "model inside tilewright.autotune.on_first_use() instead"
            )
    elif options.op is not None:
        groups = {op: {"group_size": options.group_size} if op.startswith("int4") else {} for op in options.op}
        shapes, x_dtype = options.shape or [(4096, 4096)], dtype or torch.bfloat16
        found = [Problem(op, m, n, k, x_dtype, **groups[op]) for op in options.op for n, k in shapes for m in options.m]
    else:
        raise ValueError("name a folder that save_model wrote, or operators with --op")
    return list(dict.fromkeys(replace(problem, **facts) for problem in found))


def _kernels(problems: list[Problem], implementations: bool) -> list[Asked]:
    """Kernels first, so that implementations are then compared at their best; each bucket once."""
    found: dict[tuple[str, str], Asked] = {}
    for problem in problems:
        for tuned, derived in tuning.kernels_for(problem):
            found.setdefault((tuned.name, str(tuned.hooks.facts(derived))), (tuned, derived))
    for problem in problems if implementations else ():
        tuned = tuning.implementation_of(problem.op)
        if len(tuned.split_candidates(problem)[0]) > 1:
            found.setdefault((tuned.name, str(tuned.hooks.facts(problem))), (tuned, problem))
    return list(found.values())


@contextlib.contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[str, float], None]]:
    """A bar where somebody is watching; called with what is done now, and how much of it is done."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda words, done: bar.update(task, description=words, completed=done)


def _words(tuned: autotune.Tunable, problem: Problem) -> str:
    return f"{tuned.name} M={problem.m} N={problem.n} K={problem.k}"


def _time(asked: list[Asked], short: autotune.ShortList | None, seconds: float, console: Console) -> int:
    end = time.monotonic() + seconds
    device = tuning.device_kind(asked[0][1])
    failures = 0
    with _progress(console, len(asked)) as show:
        for place, (tuned, problem) in enumerate(asked):
            left = end - time.monotonic()
            if left <= 0:
                console.print(f"the time is over: {len(asked) - place} of {len(asked)} were not tuned")
                failures += 1
                break
            candidates = None if short is None else short.candidates(tuned, problem)

            def progress(done: int, total: int, tuned: Any = tuned, problem: Any = problem, place: int = place) -> None:
                show(_words(tuned, problem), place + done / total)

            # Those that end early leave their share to the others.
            budget = left / (len(asked) - place)
            outcome = autotune.tune(tuned, problem, budget, candidates=candidates, progress=progress)
            console.print(f"{_words(tuned, problem)}: {_outcome(tuned, outcome)}")
            failures += outcome.config is None
    console.print(f"written to {tables.table_path(device)}")
    return int(failures > 0)


def _outcome(tuned: autotune.Tunable, outcome: autotune.Outcome) -> str:
    if outcome.config is None:
        return "nothing could be timed: " + "; ".join(outcome.words())
    chosen = " ".join(f"{name}={value}" for name, value in tuned.encode(outcome.config).items())
    took = f"{1e6 * outcome.seconds[outcome.config]:.1f} us"
    against = "as the heuristic has it" if outcome.config == outcome.heuristic else f"{outcome.speedup:.2f}x faster"
    notes = [f"{len(outcome.seconds)} timed"]
    notes += [f"{len(outcome.failed)} failed"] if outcome.failed else []
    notes += [f"{len(outcome.left_out)} left out for want of time"] if outcome.left_out else []
    return f"{chosen}, {took}, {against} ({', '.join(notes)})"


def _prune(options: argparse.Namespace, console: Console) -> int:
    target = TARGETS[options.target]
    if target.backend == "cuda":
        facts: dict[str, Any] = {"capability": divmod(int(target.arch), 10)}
    else:
        facts = {"capability": None, "gpu_arch": str(target.arch)}
    facts |= {"device": "cuda", "multiprocessors": MULTIPROCESSORS[target.name], "device_name": ""}
    asked = _kernels(_problems(options, facts, console), implementations=False)
    if not asked:
        raise ValueError("no Triton kernel serves these layers, or Triton is not installed: nothing to compile")
    output = options.output or Path(f"shortlist-{target.name}.json")
    end = time.monotonic() + options.seconds
    found: list[autotune.Pruned] = []
    with _progress(console, len(asked)) as show:
        for place, (tuned, problem) in enumerate(asked):
            if time.monotonic() > end:
                console.print(f"the time is over: {len(asked) - place} of {len(asked)} were not compiled")
                break

            def progress(done: int, total: int, tuned: Any = tuned, problem: Any = problem, place: int = place) -> None:
                show(_words(tuned, problem), place + done / total)

            pruned = autotune.prune(tuned, problem, target.name, progress)
            found.append(pruned)
            console.print(f"{_words(tuned, problem)}: {len(pruned.kept)} kept, {len(pruned.dropped)} dropped")
            # After every problem: a run that is stopped leaves what it has.
            autotune.write_short_list(output, target.name, found)
    console.print(f"written to {output}")
    return int(len(found) < len(asked))
