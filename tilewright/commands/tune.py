"""``tilewright tune``: find the fastest kernels for the layers of a converted model, before it is used.

    tilewright tune small/ --m 1,16,64,512                         time them on this machine's GPU, or its CPU
    tilewright tune small/ --model networks:resnet --image 3,224,224 --m 1,8       with convolutions: runs it once
    tilewright tune small/ --offline --target sm_90 -o short.json  compile them all for a chip that is not here
    tilewright tune small/ --shortlist short.json                  time only what the list keeps
    tilewright tune --op int4_linear --shape 4096x4096 --group-size 128 --m 1,16

The folder is one that ``tilewright.save_model`` wrote. Without --model the linear layers are tuned, for so many rows of
activations as --m says. With it, everything that the model calls is, for so many inputs: --model is what load_model
takes as its factory ("module:function", or a folder with a Hugging Face config.json), --image or --tokens an input.

What is found goes to the user's table: ``tilewright cache``. --offline goes on from what its output already holds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tilewright import autotune
from tilewright.aot.targets import TARGETS
from tilewright.autotune import folders, tables
from tilewright.autotune.device import triton_version
from tilewright.autotune.shortlist import shipped
from tilewright.commands import problems
from tilewright.commands.model_files import DTYPES, skeleton
from tilewright.convert.recipes import formats
from tilewright.kernels import tuning
from tilewright.kernels.dispatch.card import make_arguments
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.nn import QuantizedLinear

#: Of a chip of each target (A100, L40S, H200, B200, MI300X): the heuristics count them.
MULTIPROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148, "gfx942": 304}
#: Operators that can be named, and the group size of their weights, None where there are no groups.
OPS = {s.module.op_name: getattr(s, "group_size", None) for s in formats(QuantizedLinear).values()}
Asked = tuple[autotune.Tunable, Problem]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folder", nargs="?", type=Path, help="a folder that save_model wrote")
    parser.add_argument("--m", type=_batches, default=(1, 16, 64, 512), help="rows, or inputs, e.g. 1,16,64,512")
    parser.add_argument("--model", help="what makes the unconverted model, to run it and tune its convolutions too")
    parser.add_argument("--image", metavar="C,H,W", help="an input of the model is an image")
    parser.add_argument("--tokens", type=int, help="an input of the model is so many token ids")
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
    if device == "cpu" and folders.cpu_tables_off():
        raise ValueError(f"{folders.CPU_VARIABLE}=off turns off what is found on a CPU")
    facts = device_facts(torch.device(device, 0) if device == "cuda" else torch.device(device))
    asked = _kernels(_problems(options, facts, console), implementations=True)
    if not asked:
        console.print("nothing to tune: one implementation serves every layer, and it has no configurations")
        return 0
    short = _short_list(options.shortlist, facts, console)
    return _time(asked, short, options.seconds, console)


def _short_list(path: Path | None, facts: dict[str, Any], console: Console) -> autotune.ShortList | None:
    """The list that the user named, else the one that comes with the package for this chip."""
    if path is not None:
        short: autotune.ShortList | None = autotune.ShortList.read(path)
    else:
        short = shipped(tuning.device_kind(Problem("linear", 1, 1, 1, torch.bfloat16, **facts)).arch)
    if short is not None and (outdated := short.outdated()):
        console.print(
            f"{len(outdated)} of {len(short.lists)} lists of candidates for {short.target} are of other versions of "
            "the kernels: there the whole space is timed"
        )
    return short


def _problems(options: argparse.Namespace, facts: dict[str, Any], console: Console) -> list[Problem]:
    """Each problem of the model or of the operators once, for every batch, on the device of ``facts``."""
    dtype = DTYPES.get(options.dtype)
    if options.folder is not None and options.model is not None:
        # What is to be compiled for another chip is asked for by a run on this CPU.
        here = torch.device("cuda" if facts["device"] == "cuda" and not options.offline else "cpu")
        build = functools.partial(skeleton, options.model)
        run = (options.m, options.tokens, options.image, dtype, here)
        found = problems.of_run(options.folder, build, *run)
    elif options.folder is not None:
        found, others = problems.of_manifest(options.folder, options.m, dtype)
        if others:
            console.print(
                f"{others} layers are left out: a convolution's work depends on the size of its image, which no "
                "checkpoint holds. Name what makes the model, and an input, as well: --model package.module:function "
                "--image 3,224,224"
            )
    elif options.op is not None:
        asked = itertools.product(options.op, options.shape or [(4096, 4096)], options.m)
        groups = {op: options.group_size if OPS[op] else None for op in options.op}
        found = [Problem(op, m, n, k, dtype or torch.bfloat16, group_size=groups[op]) for op, (n, k), m in asked]
    else:
        raise ValueError("name a folder that save_model wrote, or operators with --op")
    return list(dict.fromkeys(replace(problem, **facts) for problem in found))


def _kernels(posed: list[Problem], implementations: bool) -> list[Asked]:
    """Kernels first, so that implementations are then compared at their best; each bucket once."""
    found: dict[tuple[str, str], Asked] = {}
    for problem in posed:
        for tuned, derived in tuning.kernels_for(problem):
            found.setdefault((tuned.name, str(tuned.hooks.facts(derived))), (tuned, derived))
    for problem in posed if implementations else ():
        tuned = tuning.implementation_of(problem.op)
        if _has_samples(problem) and len(tuned.split_candidates(problem)[0]) > 1:
            found.setdefault((tuned.name, str(tuned.hooks.facts(problem))), (tuned, problem))
    return list(found.values())


def _has_samples(problem: Problem) -> bool:
    """Whether arguments can be made up for it; the choice of an operator without them, 2:4 for one, is not tuned."""
    try:
        make_arguments(problem, "meta")
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def _watched(asked: list[Asked], console: Console) -> Iterator[Iterator[tuple[int, Asked, Callable[[int, int], None]]]]:
    """Each with its place and what is told how much of it is done, for a bar where somebody is watching."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(asked))

        def show(place: int, done: int, total: int) -> None:
            bar.update(task, description=_describe(*asked[place]), completed=place + done / total)

        yield ((place, one, functools.partial(show, place)) for place, one in enumerate(asked))


def _describe(tuned: autotune.Tunable, problem: Problem) -> str:
    words = f"{tuned.name} M={problem.m} N={problem.n} K={problem.k}"
    sizes = problem.conv
    if sizes is None:
        return words
    window, images = "x".join(map(str, sizes.kernel)), f"{sizes.batch} x {sizes.height}x{sizes.width}"
    return f"{words} ({window} / {sizes.stride[0]} on {images}{f', {sizes.groups} groups' if sizes.groups > 1 else ''})"


def _time(asked: list[Asked], short: autotune.ShortList | None, seconds: float, console: Console) -> int:
    end = time.monotonic() + seconds
    device = tuning.device_kind(asked[0][1])
    failures = 0
    with _watched(asked, console) as each:
        for place, (tuned, problem), progress in each:
            left = end - time.monotonic()
            if left <= 0:
                console.print(f"the time is over: {len(asked) - place} of {len(asked)} were not tuned")
                failures += 1
                break
            candidates = None if short is None else short.candidates(tuned, problem)
            # Those that end early leave their share to the others.
            budget = left / (len(asked) - place)
            outcome = autotune.tune(tuned, problem, budget, candidates=candidates, progress=progress)
            console.print(f"{_describe(tuned, problem)}: {_outcome(tuned, outcome)}")
            failures += outcome.config is None
    console.print(f"written to {tables.table_path(device)}")
    return int(failures > 0)


def _outcome(tuned: autotune.Tunable, outcome: autotune.Outcome) -> str:
    if outcome.config is None:
        return outcome.reason or "nothing could be timed: " + "; ".join(outcome.words())
    chosen = " ".join(f"{name}={value}" for name, value in tuned.encode(outcome.config).items())
    took = f"{1e6 * outcome.seconds[outcome.config]:.1f} us"
    if outcome.config == outcome.heuristic:
        against = "as the heuristic has it"
    elif outcome.speedup is None:
        against = "which the heuristic's could not be timed against"
    else:
        against = f"{outcome.speedup:.2f}x faster"
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
    short = _continued(output, target.name, console)
    compiler = autotune.Compiler(target)
    end = time.monotonic() + options.seconds
    with _watched(asked, console) as each:
        for place, (tuned, problem), progress in each:
            known = short.of(tuned, problem)
            if known is not None:
                console.print(
                    f"{_describe(tuned, problem)}: {len(known['kept'])} kept, {len(known['dropped'])} dropped before"
                )
                continue
            if time.monotonic() > end:
                console.print(
                    f"the time is over: {len(asked) - place} of {len(asked)} were not looked at; the same command "
                    "goes on from here"
                )
                return 1
            pruned = autotune.prune(tuned, problem, target.name, progress, compiler)
            console.print(f"{_describe(tuned, problem)}: {len(pruned.kept)} kept, {len(pruned.dropped)} dropped")
            # After every problem: a run that is stopped leaves what it has.
            short.add(pruned)
            short.write(output)
    console.print(f"written to {output}")
    return 0


def _continued(path: Path, target: str, console: Console) -> autotune.ShortList:
    """The short list at ``path``, to be added to; an empty one where there is none, or one of another Triton."""
    if not path.exists():
        return autotune.ShortList(target)
    found = autotune.ShortList.read(path)
    if found.target != target:
        raise ValueError(
            f"{path} is a short list for {found.target}, not for {target}: name another file with --output"
        )
    if found.triton != triton_version():
        console.print(f"{path} was made with Triton {found.triton}: everything is compiled anew")
        return autotune.ShortList(target)
    return found
