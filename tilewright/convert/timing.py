"""Timing layers side by side on what reaches them: ``convert_model(..., example_inputs=x, keep_if_faster=True)``."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tilewright.autotune.clock import Clock, clock_for
from tilewright.convert import calibrate

#: Shapes of input that are kept for one layer.
MOST_SHAPES = 8
REPEATS = 9
#: Written between two calls on a CPU, so that weights come from memory as they do in a model.
EVICTED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Reached:
    """An input that reached a layer, and how many calls had one of its shape."""

    x: torch.Tensor
    calls: int


@dataclass(frozen=True)
class Times:
    """Seconds of one pass over the example inputs. rows: of activations, of the largest input; 0 for a model."""

    before: float
    after: float
    rows: int

    @property
    def slower(self) -> bool:
        """Whether the conversion does not pay."""
        return self.after >= self.before

    def describe(self) -> str:
        """Both times."""
        what = f"with {self.rows} rows" if self.rows else "on the example inputs"
        return f"{1e6 * self.before:.4g} us as it was, {1e6 * self.after:.4g} us converted, {what}"


def inputs_of(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Iterable[Any]) -> dict[str, list[Reached]]:
    """Run ``inputs`` through ``model`` in eval mode and keep one input of each shape that reaches a layer."""
    found: dict[str, dict[tuple[Any, ...], Reached]] = {name: {} for name in layers}

    def hear(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = calibrate.first_input(args, kwargs)
        if not isinstance(x, torch.Tensor) or not x.numel():
            return
        key, known = (x.shape, x.dtype, x.device), found[name]
        if key in known:
            known[key] = Reached(known[key].x, known[key].calls + 1)
        elif len(known) < MOST_SHAPES:
            known[key] = Reached(x.detach().clone(), 1)

    with calibrate.listening(layers, hear):
        calibrate.run(model, inputs, "example_inputs")
    return {name: list(kept.values()) for name, kept in found.items()}


def compare(old: nn.Module, new: nn.Module, reached: list[Reached]) -> Times | None:
    """Time both layers in turn on everything in ``reached``, in eval mode; None if nothing reached them."""
    if not reached:
        return None
    rows = max(one.x.numel() // max(one.x.shape[-1], 1) for one in reached)
    return _compare(old, new, [(one.x, one.calls) for one in reached], reached[0].x.device, rows)


def compare_models(old: nn.Module, new: nn.Module, examples: list[Any]) -> Times:
    """Time two models in turn on every example, in eval mode."""
    tensor = next((t for t in [*old.parameters(), *old.buffers()]), torch.empty(0))
    return _compare(old, new, [(item, 1) for item in examples], tensor.device, 0)


def _compare(old: nn.Module, new: nn.Module, inputs: list[tuple[Any, int]], device: torch.device, rows: int) -> Times:
    """inputs: each with the times that it counts."""
    before = after = 0.0
    with calibrate.evaluation(old), calibrate.evaluation(new):
        for item, calls in inputs:
            run_old, run_new = (functools.partial(calibrate.call, model, item) for model in (old, new))
            first, second = compare_calls(run_old, run_new, device)
            before, after = before + calls * first, after + calls * second
    return Times(before, after, rows)


def compare_calls(old: Callable[[], Any], new: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Median seconds of each, timed in turn on ``device``, operands from memory."""
    clock = clock_for(device)
    evict = torch.empty(EVICTED_BYTES, dtype=torch.uint8) if device.type == "cpu" else None
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        prepared = [_prepare(clock, run) for run in (old, new)]
        for _ in range(REPEATS):
            for run, kept in zip(prepared, times, strict=True):
                if evict is not None:
                    evict.add_(1)
                kept += clock.seconds(run, 1)
    return statistics.median(times[0]), statistics.median(times[1])


def _prepare(clock: Clock, run: Callable[[], Any]) -> Callable[[], Any]:
    for _ in range(3):
        run()
    try:
        return clock.prepare(run)
    except RuntimeError:  # a module that cannot be captured as a CUDA graph is timed with its host's share
        return run
