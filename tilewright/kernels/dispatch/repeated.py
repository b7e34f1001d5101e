"""The shortest way to a prepared call (``dispatch.layers``): one C function that looks whether a call of a layer is
like one before, and makes it (``kernels/cpu/c/eager.c``).

It asks who looks at operators and compares the layer's tensors. PyTorch's own guards of compiled graphs tell the rest
in one call: type, dtype, sizes, strides and dispatch keys of each tensor, together with what this thread adds to them,
such as autocast, transforms, tracing and modes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch

from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.same import SameTensors

Again = Callable[..., "torch.Tensor | None"]


def load() -> tuple[Any, str | None]:
    """The extension module, or None and the reason. ``kernels.cpu``, without which no call is prepared, replaces it."""
    return None, "there are no C kernels"


class Held(NamedTuple):
    """What a layer has when a call is remembered. names: of the buffers among the tensors, whose last is the bias."""

    names: tuple[str, ...]
    tensors: Sequence[torch.Tensor | None]
    same: SameTensors
    activation: str
    generation: int


@functools.cache
def why_not(slot: str) -> str | None:
    """Why no call can be remembered, or None. slot: the layer's attribute whose attribute ``repeated`` holds, by the
    shape of x, what ``remember`` returned.
    """
    module, reason = load()
    if module is None:
        return reason
    try:
        from torch._C._dynamo import guards

        watchers = (torch.is_grad_enabled, torch._C._len_torch_function_stack, torch._C._autograd._profiler_enabled)
        forward_ad = torch.autograd.forward_ad
        _ = forward_ad._current_level
        known, other, made = torch.zeros(1), torch.zeros(2), cast(Any, guards.TensorGuards)
        guard = made(known, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        if not guard.check(known) or guard.check(other):
            return "this PyTorch's guards answer otherwise"
    except Exception as error:  # whatever another PyTorch has in their place
        return f"this PyTorch lacks what it asks: {error}"
    module.setup(slot, watchers, forward_ad, router.generation, torch.get_num_threads, torch.Tensor.data_ptr)
    return None


def remember(held: Held, x: torch.Tensor, prepared: Callable[..., torch.Tensor]) -> tuple[Again, object]:
    """(a function of a layer's attributes and x, what it needs for calls like this one on contiguous ``x``, which
    ``prepared`` serves); it returns None for others. There must be no reason against it.
    """
    module, _ = load()
    guards: Any = torch._C._dynamo.guards
    there = [name for name, tensor in zip(held.names, held.tensors, strict=False) if tensor is not None]
    absent = [name for name, tensor in zip(held.names, held.tensors, strict=False) if tensor is None]
    tensors = tuple(tensor for tensor in held.tensors if tensor is not None)
    guard = guards.TensorGuards(x, *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    threads, function, given, *rest = getattr(prepared, "fixed", (1, 0, 0, None, None, None))
    biased = held.tensors[-1] is not None
    layer = held.activation, tuple(there), tuple(absent), biased, tensors, held.same.freed, held.generation
    return module.call, module.remember(guard.check, *layer, threads, function, given, *rest, prepared)
