"""What autotune needs to know of our kernels. A kernel joins with a few lines beside its heuristic:

    def candidates(problem): yield from (replace(config, num_stages=n) for config in CONFIGS for n in (2, 3, 4))
    TUNED = tunable(__name__, FusedConfig.for_problem, candidates, why_not_config)
    ...
    config = TUNED.choose(problem)          # in the launcher

The module must define functions named like the operators it serves. The choice between implementations of an operator
is tuned by the same machinery: ``implementation_of``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from tilewright.aot.launch import Launch, recorded
from tilewright.aot.targets import TARGETS
from tilewright.autotune import modes, tables
from tilewright.autotune.buckets import upper_edge
from tilewright.autotune.clock import clock_for
from tilewright.autotune.device import DeviceKind, cpu_kind, driver_version
from tilewright.autotune.folders import cpu_tables_off
from tilewright.autotune.racing import noise
from tilewright.autotune.space import Hooks, Trials, Tunable, accept
from tilewright.kernels.cpu import native
from tilewright.kernels.dispatch.card import REFERENCE, card_of, cards, make_arguments
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import Preferred, default_decision, implementations

#: What one after another is timed on a CPU should exceed its last cache; copies of the operands make up for the rest.
ROTATED_BYTES = 64 * 2**20
MOST_COPIES = 8


# ---- problems
def facts_of(problem: Problem) -> dict[str, object]:
    """What a choice depends on: the operator's name, sizes with the batch as its bucket, dtypes, alignment."""

    def name(dtype: torch.dtype | None) -> str:
        return str(dtype).removeprefix("torch.")

    found: dict[str, object] = {"op": problem.op}
    if problem.conv is None:
        found |= {"m": f"<={upper_edge(problem.m)}", "n": problem.n, "k": problem.k}
    else:
        sizes = dataclasses.asdict(problem.conv)
        found |= {key: str(value).replace(" ", "") for key, value in sizes.items()}
    found["x"] = name(problem.x_dtype)
    if problem.compute_dtype is not None and problem.compute_dtype != problem.x_dtype:
        found["compute"] = name(problem.compute_dtype)
    if problem.keep_dequantized:
        found["keep"] = True
    if problem.group_size is not None:
        found |= {"group": min(problem.group_size, problem.k), "symmetric": problem.symmetric}
    if problem.allow_tf32:
        found["tf32"] = True
    found["align"] = 16 if problem.aligned else 1
    return found


def representative(problem: Problem) -> Problem:
    """The largest batch of the bucket; a convolution stands for itself alone."""
    return problem if problem.conv is not None else problem.with_rows(upper_edge(problem.m))


def device_kind(problem: Problem) -> DeviceKind:
    """Where ``problem`` runs."""
    if problem.device == "cpu":
        return cpu_kind("" if native.why_no_native() else native.isa())
    arch = problem.gpu_arch or "sm_{}{}".format(*(problem.capability or (0, 0)))
    return DeviceKind(problem.device_name or "unknown", arch, problem.multiprocessors or 0, driver_version())


def shared_limit(problem: Problem) -> int:
    """Bytes of shared memory that a block may have on the problem's device."""
    if problem.gpu_arch is not None:
        return TARGETS["gfx942"].shared_bytes
    # 8.6, 8.9 and 12.x have 99 KB, all others since 8.0 at least what 8.0 has.
    small = problem.capability is not None and (problem.capability in ((8, 6), (8, 9)) or problem.capability[0] == 12)
    large = problem.capability is None or problem.capability[0] in (9, 10)
    return TARGETS["sm_89" if small else "sm_90" if large else "sm_80"].shared_bytes


def why_too_large(problem: Problem, tile_bytes: int, num_stages: int) -> str | None:
    """The reason why stages of ``tile_bytes`` cannot fit into shared memory, or None. One stage may be in registers."""
    needed, limit = max(num_stages - 1, 1) * tile_bytes, shared_limit(problem)
    return f"its stages take at least {needed} bytes of shared memory, a block has {limit}" if needed > limit else None


# ---- trying candidates
def _device(problem: Problem) -> torch.device:
    """The device to tune on: the current GPU for a GPU's problem."""
    if problem.device != "cuda":
        return torch.device(problem.device)
    return torch.device("cuda", torch.cuda.current_device())


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


class Checker:
    """Compares results: the first one with the definition, where that is cheap, and all others with it, in whole."""

    def __init__(self, op: str, arguments: Mapping[str, Any]) -> None:
        self.op, self.arguments = op, arguments
        self.first: tuple[torch.Tensor, ...] | None = None

    def __call__(self, result: Any) -> str | None:
        """What is wrong with ``result``, or None. Every result is NaN nowhere: the arguments are finite."""
        found = _tensors(result)
        for tensor in found:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return "NaN or infinity from finite arguments"
        if self.first is None:
            wrong = self._against_definition(found)
            if wrong is None:
                self.first = tuple(tensor.clone() for tensor in found)
            return wrong
        for tensor, expected in zip(found, self.first, strict=True):
            if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
                return f"{tensor.dtype} {list(tensor.shape)}, not {expected.dtype} {list(expected.shape)}"
            wrong = _far_apart(tensor, expected)
            if wrong is not None:
                return wrong
        return None

    def _against_definition(self, found: tuple[torch.Tensor, ...]) -> str | None:
        """A few rows and columns in both corners; of a convolution the first image."""
        a, card = dict(self.arguments), card_of(self.op)
        corners: list[tuple[dict[str, Any], tuple[Any, ...]]] = []
        if "stride" in a:
            one = {name: v[:1] if name in ("x", "residual") and v is not None else v for name, v in a.items()}
            corners.append((one, (slice(0, 1),)))
        elif card is None or card.weight_of is None or a["x"].shape[0] == 0:
            corners.append((a, ()))
        else:
            n = found[0].shape[-1]
            for rows, columns in ((slice(0, 4), slice(0, 64)), (slice(-4, None), slice(max(n - 64, 0) // 8 * 8, None))):
                corners.append((_part(a, rows, columns), (rows, columns)))
        definition = next(one.function for one in implementations(self.op) if one.name == REFERENCE)
        for arguments, place in corners:
            on_cpu = {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
            for tensor, expected in zip(found, _tensors(definition(**on_cpu)), strict=True):
                part = tensor[place] if place else tensor
                wrong = _far_apart(part.cpu(), expected)
                if wrong is not None:
                    return f"{wrong} (against the definition)"
        return None


#: Tensors of a weight that have a row for each column of the result.
_BY_COLUMN = ("weight", "weight_packed", "weight_values", "weight_meta")


def _part(arguments: dict[str, Any], rows: slice, columns: slice) -> dict[str, Any]:
    """The arguments that compute some rows and columns, counted in eights, of a linear layer's result."""
    few = dict(arguments)
    for name in ("x", "x_scale", "residual"):
        if few.get(name) is not None:
            few[name] = few[name][rows]
    for name in (*_BY_COLUMN, "weight_scale", "bias"):
        if few.get(name) is not None:
            few[name] = few[name][columns]
    if few.get("weight_zero") is not None:
        eighths = slice(columns.start // 8, None if columns.stop is None else columns.stop // 8)
        few["weight_zero"] = few["weight_zero"][eighths]
    if few.get("residual") is not None:
        few["residual"] = few["residual"][:, columns]
    return few


def _far_apart(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """In words, a difference that no rounding explains: what a wrong kernel exceeds by far. Tests are stricter."""
    if not found.dtype.is_floating_point:
        most = (found.int() - expected.int()).abs().max().item() if found.numel() else 0
        return f"an integer is off by {most}" if most > 1 else None
    error = (found.float() - expected.float()).square().mean().sqrt().item() if found.numel() else 0.0
    size = expected.float().square().mean().sqrt().item() if found.numel() else 0.0
    return None if error <= size / 64 else f"RMS error {error:.3g} where the result is {size:.3g}"


def _copies(problem: Problem, device: torch.device) -> list[dict[str, Any]]:
    """Arguments to call in turn. One on a GPU, whose cache is flushed instead."""
    first = make_arguments(problem, device)
    if device.type != "cpu":
        return [first]
    size = sum(v.numel() * v.element_size() for v in first.values() if isinstance(v, torch.Tensor))
    count = min(max(-(-ROTATED_BYTES // max(size, 1)), 1), MOST_COPIES)
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def _trials(problem: Problem, call: Callable[[Any, dict[str, Any]], Any]) -> Trials:
    device = _device(problem)
    copies = _copies(problem, device)
    turns = itertools.cycle(copies)

    def run(config: Any) -> Any:
        with torch.inference_mode():
            return call(config, next(turns))

    return Trials(run, Checker(problem.op, copies[0]), clock_for(device, len(copies)))


def _kernel_trials(tunable: Tunable, problem: Problem) -> Trials:
    function = getattr(importlib.import_module(tunable.modules[0]), problem.op)

    def call(config: Any, arguments: dict[str, Any]) -> Any:
        with tunable.forced(config):
            return function(**arguments)

    return _trials(problem, call)


def _kernel_launches(tunable: Tunable, problem: Problem, config: Any, backend: str) -> list[Launch]:
    function = getattr(importlib.import_module(tunable.modules[0]), problem.op)
    with recorded() as launches, tunable.forced(config):
        function(**make_arguments(problem, "meta"))
    # Launchers decide on inline PTX by the device of their tensors, which here is none.
    return [
        replace(launch, constants={**launch.constants, "INLINE_PTX": backend == "cuda"})
        if "INLINE_PTX" in launch.constants
        else launch
        for launch in launches
    ]


def _flat(config: Any) -> dict[str, Any]:
    """A configuration as plain values; those of a nested one are named "outer.inner"."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{name}": inner for name, inner in _flat(value).items()}
        else:
            found[field.name] = value
    return found


_KERNEL_HOOKS = Hooks(facts_of, representative, device_kind, _kernel_trials, _kernel_launches)
#: Shared by all kernels: a change here may change any of them.
_COMMON = ("tilewright.kernels.triton.common", "tilewright.kernels.triton.split_k")


def tunable(
    module: str,
    heuristic: Callable[[Problem], Any],
    candidates: Callable[[Problem], Iterable[Any]],
    why_not: Callable[[Any, Problem], str | None] = accept,
    shares: tuple[str, ...] = (),
) -> Tunable:
    """Register the kernel of ``module`` (its ``__name__``), which tables call by its folder and file.

    candidates: configurations worth timing for a problem. why_not: the reason why a configuration cannot serve a
    problem, or None. shares: further modules whose source the kernel's speed depends on.
    """
    folder, file = module.split(".")[-2:]
    sources = (module, *shares, *_COMMON)
    return Tunable(f"{folder}.{file}", heuristic, candidates, _KERNEL_HOOKS, sources, why_not, _flat)


# ---- choosing between implementations
def _why_not_implementation(name: str, problem: Problem) -> str | None:
    found = next((one for one in implementations(problem.op) if one.name == name), None)
    return f"there is no implementation {name!r}" if found is None else found.why_not(problem)


def _serving(problem: Problem) -> list[str]:
    """Those that take ``problem``; the definition itself only where there is nothing else."""
    names = [one.name for one in implementations(problem.op) if one.why_not(problem) is None]
    return [name for name in names if name != REFERENCE] or names


def _implementation_facts(problem: Problem) -> dict[str, object]:
    """As ``facts_of``; with the CPU, since the user may name one file for several."""
    return facts_of(problem) | ({"cpu": device_kind(problem).slug} if problem.device == "cpu" else {})


def _implementation_trials(tunable: Tunable, problem: Problem) -> Trials:
    known = {one.name: one for one in implementations(problem.op)}
    return _trials(problem, lambda name, arguments: known[name].function(**arguments))


#: The implementation that layers call with arguments put in place before, and whose code programs of whole blocks share
#: (``cpu.replay_rows``): a layer that leaves it also leaves the program.
C_KERNEL = "C kernel"
#: What another must save of its time, as a share and in seconds: a call through the dispatcher takes that much longer
#: than one that was prepared.
PROGRAM_GAIN, PREPARED_CALL = 0.1, 10e-6


def _limit(name: str, seconds: float) -> float:
    """Seconds that another implementation must not exceed to replace the one called ``name``."""
    if name != C_KERNEL:
        return noise(name, seconds)
    return min((1 - PROGRAM_GAIN) * seconds, seconds - PREPARED_CALL)


@functools.cache
def implementation_of(op: str) -> Tunable:
    """The choice between the implementations of ``op``, whose configurations are their names."""
    card = card_of(op)
    modules = ("tilewright.kernels.dispatch.router" if card is None else card.package, "tilewright.kernels.cpu")
    return Tunable(
        f"{op}.implementation",
        heuristic=lambda problem: default_decision(problem).name,
        candidates=lambda problem: [one.name for one in implementations(problem.op) if one.name != REFERENCE],
        hooks=Hooks(_implementation_facts, representative, device_kind, _implementation_trials),
        modules=modules,
        why_not=_why_not_implementation,
        limit=_limit,
        encode=lambda name: {"implementation": name},
    )


def preference(problem: Problem) -> Preferred | None:
    """The implementation that the user fixed, or that a table says is fastest for ``problem``, with the words for it;
    None without either.
    """
    tuned = implementation_of(problem.op)
    if tuned.is_constrained:
        name = tuned.explain(problem).config
        return Preferred(name, f"{name} was chosen by the user", "chosen by the user")
    choice, _ = tuned.tuned(problem)
    if choice is None:
        return None
    found = tables.lookup(device_kind(problem), tuned.name, tuned.hooks.facts(problem), tuned.source())
    entry = {} if found is None else found[0]
    mine, heuristics = entry.get("microseconds"), entry.get("heuristic_microseconds")
    where = "here" if choice.origin == "user" else "for the table that comes with the package"
    if isinstance(entry.get("date"), str):
        where += f" on {entry['date'][:10]}"
    words = f"{choice.config} was the fastest when it was timed {where}"
    if isinstance(mine, float) and isinstance(heuristics, float) and heuristics > mine > 0:
        words += f", {heuristics / mine:.2f} times as fast as {default_decision(problem).name}"
    return Preferred(choice.config, words, f"timed {where}")


def preferred(problem: Problem) -> str | None:
    """The name that ``preference`` gives, or None."""
    found = preference(problem)
    return None if found is None else found.name


def tune_on_first_use(problem: Problem) -> None:
    """If the user asked for it, time the implementations for ``problem`` before one of them serves it."""
    if not modes.tuning_wanted() or 0 in (problem.m, problem.k) or len(_serving(problem)) < 2:
        return
    if problem.device == "cpu" and cpu_tables_off():
        return
    # Kernels first: else tuning the first one would take the time in which implementations are compared.
    for tuned, derived in kernels_for(problem):
        tuned.choose(derived)
    implementation_of(problem.op).explain(problem)


# ---- all kernels
def import_kernels() -> None:
    """Register every tunable kernel, whose names are then in ``TUNABLES``. Raises ImportError without Triton."""
    for card in cards():
        for name, _ in card.kernel_modules:
            importlib.import_module(name)


def kernels_for(problem: Problem) -> Iterator[tuple[Tunable, Problem]]:
    """The tunable kernels behind an operator that take ``problem``, each with the problem that it is asked about."""
    card = card_of(problem.op)
    if card is None or importlib.util.find_spec("triton") is None:
        return
    for name, derive in card.kernel_modules:
        module = importlib.import_module(name)
        derived = derive(problem)
        if hasattr(module, "TUNED") and module.why_not(derived) is None:
            yield module.TUNED, derived
