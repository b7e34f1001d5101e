"""Where the time of a network goes that runs as programs: the counters of their steps, with the names of the layers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tilewright.convert.network.blocks import Block
from tilewright.convert.network.program import Program
from tilewright.kernels.cpu.replay import Replays
from tilewright.kernels.cpu.replay_counts import Count, counted, described, steps_of
from tilewright.kernels.cpu.replay_memory import storage_key
from tilewright.kernels.cpu.replay_plan import Replay

#: Calls after which a program is recorded, if it can be.
_UNTIL_RECORDED = 3


@dataclass(frozen=True)
class StepTime:
    """One step of a program. program: the name of the module that runs as one, "" for the model itself. layers: names
    of the layers whose weights it reads. what: what it does, with its sizes. together: steps that run with it and count
    with it. calls: how often. microseconds: of one of them, on average.
    """

    program: str
    layers: tuple[str, ...]
    what: str
    together: tuple[str, ...]
    calls: int
    microseconds: float


@dataclass(frozen=True)
class StepTimes:
    """What ``step_times`` found. rows: in the order of the programs. microseconds: of one call of the model, on
    average, with all that no step is: the caller's code, layers outside of programs, what is called from Python between
    steps.
    """

    rows: tuple[StepTime, ...]
    calls: int
    microseconds: float

    @property
    def outside(self) -> float:
        """Microseconds of one call of the model that are of no step."""
        return self.microseconds - sum(row.calls * row.microseconds for row in self.rows) / self.calls

    def __str__(self) -> str:
        lines = [f"{'us a call':>10} {'share':>6}  step"]
        for row in self.rows:
            each = row.calls * row.microseconds / self.calls
            names = ", ".join(row.layers)
            what = " + ".join((row.what, *row.together))
            where = f"{row.program}: " if row.program else ""
            lines.append(
                f"{each:10.1f} {each / self.microseconds:6.1%}  {where}{what}{f'  ({names})' if names else ''}"
            )
        lines.append(f"{self.outside:10.1f} {self.outside / self.microseconds:6.1%}  outside of steps")
        lines.append(f"{self.microseconds:10.1f} {1:6.1%}  a call, on average of {self.calls}")
        return "\n".join(lines)


def step_times(model: nn.Module, *args: Any, calls: int = 20, **kwargs: Any) -> StepTimes:
    """Call ``model(*args, **kwargs)`` in inference and say how long each step of its programs took, on this machine.

    model: a converted model in eval mode, on a CPU. calls: how often it is called to be counted, after three calls in
    which programs are recorded; what a call keeps, such as a cache that is among the arguments, takes all of them.
    Raises ValueError if no part of it runs as a program with these arguments, with the reason where it is known.

    >>> import tilewright as tw
    >>> model = tw.convert_model(nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()).eval(), "fuse")
    >>> tw.step_times(model, torch.randn(1, 16, 8, 8), calls=5).rows[-1].layers
    ('0',)
    """
    if calls < 1:
        raise ValueError(f"calls is {calls}: at least one is needed")
    with torch.inference_mode():
        for _ in range(_UNTIL_RECORDED):
            model(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            found = [(name, replay, stack.enter_context(counted(replay))) for name, replay in _replays_of(model)]
            begin = time.perf_counter_ns()
            for _ in range(calls):
                model(*args, **kwargs)
            passed = time.perf_counter_ns() - begin
    owners = _owners(model)
    rows = [row for name, replay, counts in found for row in _rows(name, replay, counts, owners)]
    if not rows:
        raise ValueError(f"{type(model).__name__} runs no program with these arguments{_why_not(model)}")
    return StepTimes(tuple(rows), calls, passed / 1e3 / calls)


def _programs(model: nn.Module) -> Iterator[tuple[str, Program]]:
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        programs = list(forward.programs.values()) if isinstance(forward, Block) else [forward]
        for each in programs:
            if isinstance(each, Program):
                yield name, each


def _recorders(model: nn.Module) -> Iterator[tuple[str, Replays]]:
    for name, program in _programs(model):
        replays: Replays | None = getattr(program, "_replays", None)
        if replays is not None:
            yield name, replays


def _replays_of(model: nn.Module) -> Iterator[tuple[str, Replay]]:
    for name, recorder in _recorders(model):
        for replay in recorder.replays:
            yield name, replay


def _owners(model: nn.Module) -> dict[int, str]:
    """The layer that each storage of a parameter or buffer is of."""
    return {
        storage_key(tensor): name
        for name, module in model.named_modules()
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if tensor.device.type == "cpu" and tensor.numel()
    }


def _rows(program: str, replay: Replay, counts: Any, owners: dict[int, str]) -> Iterator[StepTime]:
    steps = list(zip(steps_of(replay), replay.sources, counts, strict=True))
    begins = [number for number, (_, _, count) in enumerate(steps) if count.calls]
    for begin, end in zip(begins, [*begins[1:], len(steps)], strict=True):
        group = steps[begin:end]
        count: Count = group[0][2]
        names = dict.fromkeys(owners[key] for _, sources, _ in group for key in sorted(sources) if key in owners)
        layers = tuple(name.removeprefix(f"{program}.") if program else name for name in names)
        what, *together = (described(step) for step, _, _ in group)
        yield StepTime(program, layers, what, tuple(together), count.calls, count.nanoseconds / 1e3 / count.calls)


def _why_not(model: nn.Module) -> str:
    if model.training:
        return ": it is in training mode"
    found = [program.refused for _, program in _programs(model)]
    found += [recorder.why_not for _, recorder in _recorders(model)]
    blocks = [vars(module).get("forward") for module in model.modules()]
    found += [each.state for each in blocks if isinstance(each, Block)]
    reasons = [reason for reason in found if reason]
    return f": {reasons[0]}" if reasons else ""
