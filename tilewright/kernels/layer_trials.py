"""Timing the implementations that could serve a model's own layers, over their own weights, while it is converted."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from tilewright.autotune.buckets import upper_edge
from tilewright.autotune.clock import clock_for
from tilewright.autotune.series import Asked, Series, tune_series
from tilewright.autotune.space import Trials
from tilewright.kernels import tuning
from tilewright.kernels.dispatch.card import REFERENCE
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import Implementation, implementations
from tilewright.kernels.formats.weight import Draw

#: Layers of one problem that are timed in turns: as in a model their weights do not stay in the first caches, but each
#: is packed for every implementation.
MOST_LAYERS = 4
Weight = Mapping[str, Any]


def time_layers(posed: Iterable[tuple[Problem, Weight]], budget: float) -> tuple[Series, int]:
    """Time what could serve ``posed`` for ``budget`` seconds, and remember the fastest (``autotune.series``); returns
    what was found, and of how many problems the answer was known.

    posed: problems of linear layers on a CPU, each with the operator's arguments but x and the residual, which are
    read only. The largest first: they have the most to gain. Each bucket once.
    """
    found: dict[tuple[str, str], tuple[Problem, list[Weight]]] = {}
    for problem, weight in posed:
        tuned = tuning.implementation_of(problem.op)
        key = tuned.name, str(tuned.hooks.facts(problem))
        _, weights = found.setdefault(key, (problem, []))
        if len(weights) < MOST_LAYERS and not any(weight is known for known in weights):
            weights.append(weight)
    asked, known = [], 0
    for problem, weights in sorted(found.values(), key=lambda one: -one[0].m * one[0].n * one[0].k):
        tuned = tuning.implementation_of(problem.op)
        choice, _ = tuned.tuned(problem)
        if tuned.is_constrained or len(_serving(problem)) < 2:
            continue
        if choice is not None and choice.origin == "user":
            known += 1
            continue
        sample = problem.with_rows(upper_edge(problem.m))
        asked.append(Asked(tuned, problem, functools.partial(trials, sample, weights)))
    return tune_series(asked, budget), known


def _serving(problem: Problem) -> list[str]:
    return [one.name for one in implementations(problem.op) if one.name != REFERENCE and one.why_not(problem) is None]


def trials(problem: Problem, weights: Sequence[Weight]) -> Trials:
    """Trials of the implementations of ``problem.op`` on layers in turns. weights: their arguments but x, which is
    drawn, and the residual, of which there is none.
    """
    known = {one.name: one for one in implementations(problem.op)}
    x = Draw().normal(problem.m, problem.k, dtype=problem.x_dtype)
    arguments = [{"x": x, "residual": None, **weight} for weight in weights]
    checkers = [tuning.Checker(problem.op, each) for each in arguments]
    turns, now = itertools.cycle(range(len(weights))), [0]
    calls: dict[tuple[str, int], Callable[[], Any]] = {}

    def run(name: str) -> Any:
        key = name, next(turns)
        now[0] = key[1]
        with torch.inference_mode():
            if key not in calls:
                calls[key] = layer_call(known[name], arguments[key[1]])
            return calls[key]()

    def check(result: Any) -> str | None:
        return checkers[now[0]](result)

    return Trials(run, check, clock_for(torch.device(problem.device), len(weights)))


def layer_call(implementation: Implementation, arguments: dict[str, Any]) -> Callable[[], Any]:
    """A call as a layer makes it again and again. arguments: the operator's, x and the residual among them."""
    if implementation.prepared is None:
        return lambda: implementation.function(**arguments)
    x, weight = arguments["x"], {name: value for name, value in arguments.items() if name not in ("x", "residual")}
    prepared = implementation.prepared(**weight, k=x.shape[-1])
    for_rows = getattr(prepared, "for_rows", None)
    if for_rows is not None:
        prepared = for_rows(x.shape, x.dtype)
    residual = arguments["residual"]
    return (lambda: prepared(x)) if residual is None else lambda: prepared(x, residual)
