"""Timing what could serve the layers of a model, on this machine, at the end of its conversion.

Off a table, or an order of preference, nobody knows how fast an implementation is on the user's processor. What the
sample inputs show is how many rows each layer sees; so where there are any, the implementations that could serve each
layer at those rows are timed once and the fastest is remembered for this machine (``kernels.layer_trials``). On a CPU
alone: a GPU's kernels would have to be compiled first, which takes minutes (``tilewright tune``).
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from tilewright.autotune import modes
from tilewright.autotune.folders import cpu_tables_off
from tilewright.autotune.series import Series
from tilewright.convert import calibrate
from tilewright.kernels.cpu import native
from tilewright.kernels.dispatch.layers import invalidate as invalidate_calls
from tilewright.kernels.dispatch.packed import invalidate as invalidate_packed
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import record_problems
from tilewright.kernels.layer_trials import Weight, time_layers
from tilewright.nn import QuantizedLinear

#: Seconds for a whole model: unasked, and where the user asked for it.
UNASKED, ASKED = 2.0, 10.0
#: Rows of activations where no sample input says how many there are.
ROWS = (1, 16, 128, 512)


def wanted(tune: bool | None, with_inputs: bool) -> bool:
    """Whether candidates are to be timed. tune: as of ``convert_model``."""
    if cpu_tables_off() or tune is False:
        return False
    return tune is True or (with_inputs and os.environ.get(modes.VARIABLE, "") != "0")


def time_candidates(model: nn.Module, inputs: Iterable[Any], asked: bool) -> str:
    """Time what could serve the converted linear layers of ``model`` that are on the CPU, and remember the fastest.
    Returns what came of it, in words for the report; "" where there was nothing to choose from.

    inputs: which the model is called with to see the rows that reach its layers; where none are reached, ``ROWS`` of
    each. asked: by the user, so that there is more time.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear) and _can_be_timed(module)]
    if not layers or native.why_no_native():
        return ""
    try:
        found, known = time_layers(_posed(layers, _problems(model, inputs)), ASKED if asked else UNASKED)
    finally:
        for layer in layers:  # what was packed for candidates
            invalidate_calls(layer)
            for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
                invalidate_packed(tensor)
    return _words(found, known)


def _can_be_timed(layer: QuantizedLinear) -> bool:
    """Whether a layer calls its operator with nothing but x and what it holds: one of fixed int8 inputs does not."""
    held = all(hasattr(layer, name) for name in layer._by_name.values())
    return held and layer.device.type == "cpu" and bool(layer.in_features) and bool(layer.out_features)


def _problems(model: nn.Module, inputs: Iterable[Any]) -> list[Problem]:
    """What the operators of ``model`` are asked when it is called with each of ``inputs``."""
    with calibrate.evaluation(model), torch.inference_mode(), record_problems() as posed:
        for item in inputs:
            calibrate.call(model, item)
    return posed


def _posed(layers: list[QuantizedLinear], posed: list[Problem]) -> Iterator[tuple[Problem, Weight]]:
    """Each layer's problems with its arguments: at the rows that reached layers of its kind, else at ``ROWS``."""
    seen: dict[Problem, list[Problem]] = {}
    for problem in posed:
        seen.setdefault(problem.with_rows(1), []).append(problem)
    any_seen = any(layer.problem(1) in seen for layer in layers)
    for layer in layers:
        weight, one = layer._arguments(), layer.problem(1)
        for problem in seen.get(one, []) if any_seen else map(one.with_rows, ROWS):
            if problem.m:
                yield problem, weight


def _words(found: Series, known: int) -> str:
    if found.doubt is not None:
        return (
            f"implementations were not timed, the machine is busy ({found.doubt}); `tilewright tune` times them later"
        )
    if not (found.timed or found.unclear or found.left_out or known):
        return ""
    day = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    parts = [f"{len(found.timed)} timed here on {day} in {found.seconds:.1f} s"] if found.timed else []
    if found.changed:
        parts.append(f"{found.changed} of them are served by another implementation than without timing")
    parts += [f"{known} were timed before"] if known else []
    parts += [f"{len(found.unclear)} stay as without timing, their times spread"] if found.unclear else []
    parts += [f"{found.left_out} left for want of time (`tilewright tune`)"] if found.left_out else []
    return f"layer sizes: {', '.join(parts)}"
