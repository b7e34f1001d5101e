"""One kernel launch as data, so that the launch a GPU runs is the one that is compiled ahead of time or emulated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

_recording: ContextVar[list[Launch] | None] = ContextVar("recorded launches", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, and in this thread alone, launches are not run but appended to the list.

    So an operator called on tensors without memory gives what it would launch, to be compiled ahead of time.
    """
    launches: list[Launch] = []
    token = _recording.set(launches)
    try:
        yield launches
    finally:
        _recording.reset(token)


@dataclass(frozen=True)
class Launch:
    """A Triton kernel with everything its launch needs.

    kernel: the ``@triton.jit`` function. grid: up to three program counts. args: run-time arguments by parameter name
    (tensors, ints, floats, ``None`` for an absent pointer). constants: values of the ``tl.constexpr`` parameters.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    @property
    def device(self) -> torch.device:
        """Device of the first tensor argument."""
        return next(value.device for value in self.args.values() if isinstance(value, torch.Tensor))

    def run(self) -> None:
        """Launch on the device that holds the tensors, whichever device is current. An empty grid launches nothing.

        Inside ``recorded`` the launch is noted down instead.
        """
        recording = _recording.get()
        if recording is not None:
            recording.append(self)
            return
        if 0 in self.grid:
            return
        device = self.device
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with guard:
            self.kernel[self.grid](**self.args, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)
