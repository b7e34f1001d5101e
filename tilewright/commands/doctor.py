"""``tilewright doctor``: what this machine has and which kernels serve on it; what converting a model could give.

    tilewright doctor                                          this machine: what is missing and what that costs
    tilewright doctor --measure                                measures this CPU first, for two seconds: products by
                                                               instruction set, reading from caches and memory
    tilewright doctor MODEL --batch 8 --chip H200              each layer: bound by memory or compute, the best any
                                                               format could give, or why this will not help

MODEL is a folder with a Hugging Face config.json, a .safetensors file or a folder of them, or "module:function" where
the function returns an nn.Module. --tokens 128 or --image 3,224,224 say what an input looks like: without either, a
linear layer is taken to see one row for each input of the batch. Nothing is converted and no weight is read.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from tilewright.autotune import folders, tables
from tilewright.autotune.device import cpu_kind
from tilewright.autotune.shortlist import shipped
from tilewright.autotune.store import TableError, read_table
from tilewright.commands.diagnosis import diagnose
from tilewright.commands.model_files import DTYPES, example_input, skeleton
from tilewright.convert.recipes import formats
from tilewright.kernels import tuning
from tilewright.kernels.conv_geometry import ConvGeometry
from tilewright.kernels.convolution import convolution_problem
from tilewright.kernels.cpu import build, native, peaks
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import route
from tilewright.nn import ConvLayer, QuantizedLinear

#: What missing C kernels cost on a CPU: the operators of PyTorch that serve instead, 4096 x 4096, two threads of an AMD
#: EPYC (Zen 4), 1 to 512 rows.
COST = "int4 layers take up to 5 times as long, int8 weight-only layers up to 3 times, int8 layers up to 2 times"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and whether it is as good as it can be here."""

    subject: str
    found: str
    good: bool = True


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        return Finding("triton", "not installed: GPU kernels cannot be used", good=not torch.cuda.is_available())
    return Finding("triton", _version("triton") or "installed, of an unknown version")


def _gpu() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("GPU", "none that PyTorch can use")
        return
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    yield Finding("GPU", names)
    if importlib.util.find_spec("triton") is not None:
        yield from short_list("sm_{}{}".format(*torch.cuda.get_device_capability()))


def short_list(arch: str) -> Iterator[Finding]:
    """Whether what was compiled ahead of time for a chip is still of the kernels as they are."""
    known = shipped(arch)
    if known is None:
        return
    tuning.import_kernels()
    old, count = len(known.outdated()), len(known.lists)
    words = f"{count} lists of candidates, compiled ahead of time with Triton {known.triton}"
    if old:
        words += f"; {old} are of other versions of the kernels, so `tilewright tune` times whole spaces there"
    yield Finding(f"tuning on {arch}", words, good=not old)


def _c_kernels() -> Iterator[Finding]:
    try:
        reason = native.why_no_native()
    except ValueError as error:  # TILEWRIGHT_CPU_ISA asks for what is not there
        reason = str(error)
    if reason is None:
        best = next(name for name in build.isas() if name != "portable" and native.supports(name))
        note = "" if native.isa() == best else f"; TILEWRIGHT_CPU_ISA turns off the better {best}"
        yield Finding("C kernels", f"use {native.isa()}{note}", good=not note)
        _, missing = native.eager()
        if missing is not None:
            yield Finding("  short calls", f"2 us more for each call of a layer: {missing}", good=False)
        return
    yield Finding("C kernels", reason, good=False)
    yield Finding("  what that costs", COST, good=False)
    if not build.LIBRARY.is_file():
        yield Finding("  what helps", _advice(), good=False)


def _advice() -> str:
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        return f"{error}: install one, then install tilewright again"
    return f"there is a compiler now ({Path(compiler).name}): install tilewright again"


def _tuned() -> Iterator[Finding]:
    yield _tables()
    if folders.cpu_tables_off():
        yield Finding("timed on this CPU", f"nothing decides: {folders.CPU_VARIABLE}=off")
        return
    try:
        device = tuning.device_kind(Problem("linear", 1, 1, 1, torch.float32))
    except ValueError:  # already said
        return
    for key, entry in sorted(tables.entries_of(device).items()):
        name, *parts = key.split(" | ")
        facts = dict(part.partition("=")[::2] for part in parts)
        took, against = entry.get("microseconds"), entry.get("heuristic_microseconds")
        words = f"{' '.join(map(str, entry['config'].values()))}, {took} us"
        if against not in (None, took):
            words += f" ({' '.join(map(str, entry.get('heuristic', {}).values()))} {against} us)"
        size = " x ".join(facts.get(fact, "?") for fact in ("m", "n", "k"))
        yield Finding(f"  {name.partition('.')[0]} {size} {facts.get('x', '')}", words)


def _tables() -> Finding:
    entries = 0
    for path in tables.user_tables():
        try:
            entries += len(read_table(path))
        except (TableError, OSError) as error:
            return Finding("tuned choices", f"{path.name} cannot be used: {error}", good=False)
    if not entries:
        return Finding("tuned choices", "none, heuristics decide (`tilewright tune` times this machine)")
    return Finding("tuned choices", f"{entries} in {folders.user_folder()} (`tilewright cache show`)")


def _measured(anew: bool) -> Iterator[Finding]:
    """What this CPU does at most. anew: measure it now."""
    try:
        reason = native.why_no_native()
    except ValueError:  # already said
        return
    if reason is not None:
        return
    found = peaks.measure() if anew else peaks.stored()
    if found is None:
        yield Finding("CPU at most", "not measured yet: `tilewright doctor --measure` takes two seconds")
        return
    if anew:
        yield _kept(found)
    counts = sorted({1, found.threads})
    threads = f"{' / '.join(map(str, counts))} threads"
    yield Finding(f"CPU at most, {threads}", f"measured {found.date[:10]}")
    for isa in found.isas:
        rates = {
            dtype: " / ".join(f"{found.products(dtype, isa, each) / 1e9:.0f}" for each in counts)
            for dtype in peaks.DTYPES
            if found.products(dtype, isa)
        }
        yield Finding(f"  {isa}, GOPS", ", ".join(f"{dtype} {words}" for dtype, words in rates.items()))
    rates = {each: " / ".join(f"{found.bandwidth(each, count) / 1e9:.1f}" for count in counts) for each in found.levels}
    yield Finding("  read, GB/s", ", ".join(f"{level} {words}" for level, words in rates.items()))
    yield Finding("  an empty parallel region", f"{1e6 * found.region:.2f} us")


def _kept(found: peaks.Peaks) -> Finding:
    """What became of a measurement."""
    if found.doubt is not None:
        return Finding("measured now", f"{found.doubt}: figures may be too low, and nothing was written", good=False)
    try:
        written = peaks.store(found)
    except OSError as error:  # a lock that stays, too
        return Finding("measured now", f"{peaks.path()} cannot be written: {error}", good=False)
    if not written:
        return Finding("measured now", f"nothing was written: {folders.CPU_VARIABLE}=off")
    return Finding("measured now", f"written to {peaks.path()}")


def _dispatched() -> Iterator[Finding]:
    try:
        native.why_no_native()
    except ValueError:  # already said
        return
    for stem, scheme in formats(QuantizedLinear).items():
        problem = replace(scheme.build(nn.Linear(256, 256)).problem(), n=4096, k=4096)  # type: ignore[operator]
        chosen = {rows: route(problem.with_rows(rows)).name for rows in (1, 256)}
        names = list(dict.fromkeys(chosen.values()))
        found = names[0] if len(names) == 1 else ", ".join(f"{name} at {rows} rows" for rows, name in chosen.items())
        yield Finding(f"{stem} on this CPU", found, good=names != ["reference"])
    sizes = ConvGeometry(1, 64, 56, 56, 64, (3, 3), padding=(1, 1, 1, 1))
    for stem, scheme in formats(ConvLayer).items():
        dtype = torch.float32 if scheme.lossless else torch.int8
        name = route(convolution_problem(scheme.module.op_name, sizes, dtype, dtype, bias=True)).name
        yield Finding(f"{stem} convolutions on this CPU", name, good=name != "reference")


def examine(measure: bool = False) -> list[Finding]:
    """Look at this machine. Starts no GPU kernel and changes nothing. measure: what this CPU does at most, for two
    seconds, which is then kept.
    """
    return [
        Finding("tilewright", _version("tilewright") or "not installed, run from its source"),
        Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("torch", torch.__version__),
        _triton(),
        *_gpu(),
        Finding("CPU", cpu_kind().name),
        Finding("CPU threads", str(torch.get_num_threads())),
        Finding("CPU, as PyTorch sees it", torch.backends.cpu.get_cpu_capability()),
        *_c_kernels(),
        *_measured(measure),
        *_dispatched(),
        *_tuned(),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", nargs="?", help="what to look at; without it, this machine")
    parser.add_argument("--batch", type=int, default=1, help="inputs at once; default: 1")
    parser.add_argument("--chip", help="a GPU by name, or cpu; default: the GPU that is here, else this CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: each layer's")
    parser.add_argument("--tokens", type=int, help="an input is so many token ids")
    parser.add_argument("--image", metavar="C,H,W", help="an input is an image")
    parser.add_argument("--measure", action="store_true", help="measure this CPU for two seconds and keep the figures")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit status: of the machine 1 if something could be better. Wrong input raises
    ValueError or OSError.
    """
    if options.model is None:
        findings = examine(options.measure)
        print_findings(findings)
        return int(not all(finding.good for finding in findings))
    if options.measure:
        raise ValueError("--measure is about this machine: leave the model out")
    model = skeleton(options.model)
    inputs = example_input(options.batch, options.tokens, options.image)
    chip = options.chip or (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    diagnose(model, inputs, batch=options.batch, chip=chip, dtype=DTYPES.get(options.dtype)).print(Console())
    return 0


def print_findings(findings: list[Finding], console: Console | None = None) -> None:
    """A table, with a mark in front of what could be better."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        mark, style = ("", "") if finding.good else ("!", "yellow")
        table.add_row(mark, finding.subject, finding.found, style=style)
    (console or Console()).print(table)
