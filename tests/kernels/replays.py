"""What tests of steps share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tilewright.kernels.cpu.replay import Replays
from tilewright.kernels.cpu.replay_plan import Replay


def replayed(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> tuple[torch.Tensor, Replay]:
    """What the replay of ``function`` gives for other inputs than it was recorded on."""
    fast = Replays(function)
    with torch.no_grad():
        others = [torch.randn_like(x) if x.is_floating_point() else x for x in inputs]
        fast(*others), fast(*others)
        assert fast.replays, fast.why_not
        assert not fast.replays[0].python_steps
        return fast(*inputs), fast.replays[0]
