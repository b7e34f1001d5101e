"""``tilewright::region``: a part of a network that a compiled graph calls as one operator.

A converted image network on a CPU is a few C calls (``cpu.replay``). Traced operator by operator that would be lost: a
compiler calls each of them, at more cost than many convolutions have. So the graph calls the network as it is in eager
mode, which looks for itself whether it is still the one that was recorded.

Regions live as long as their owner. Their names are unlike those of all other processes, as compilers keep what they
made in files and find it again by the text of the graph.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tilewright.kernels.dispatch.library import NAMESPACE


@dataclass(frozen=True)
class OpaqueRegion:
    """run: from the inputs to the one tensor that results. fake: the same for fake tensors, operator by operator. Both
    are methods of the owner.
    """

    run: weakref.WeakMethod[Callable[..., torch.Tensor]]
    fake: weakref.WeakMethod[Callable[..., torch.Tensor]]


_regions: weakref.WeakValueDictionary[str, OpaqueRegion] = weakref.WeakValueDictionary()


def add(region: OpaqueRegion) -> str:
    """The name under which ``torch.ops.tilewright.region`` finds ``region``, which the caller keeps alive."""
    name = uuid.uuid4().hex
    _regions[name] = region
    return name


def _alive(method: weakref.WeakMethod[Callable[..., torch.Tensor]] | None) -> Callable[..., torch.Tensor]:
    found = None if method is None else method()
    if found is None:
        raise RuntimeError("the network that this compiled graph calls is gone")
    return found


def _kernel(inputs: list[torch.Tensor], name: str) -> torch.Tensor:
    region = _regions.get(name)
    result = _alive(None if region is None else region.run)(*inputs)
    # What an operator returns is its own.
    storage = result.untyped_storage().data_ptr()
    return result.clone() if any(x.untyped_storage().data_ptr() == storage for x in inputs) else result


def _fake(inputs: list[torch.Tensor], name: str) -> torch.Tensor:
    mode: Any = torch._guards.detect_fake_mode(inputs)
    region = _regions.get(name)
    function = _alive(None if region is None else region.fake)
    if mode is None:
        return function(*inputs)
    allowed, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True  # the weights
    try:
        return function(*inputs)
    finally:
        mode.allow_non_fake_inputs = allowed


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("region(Tensor[] inputs, str name) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("region", _kernel, "CPU")
torch.library.register_fake(f"{NAMESPACE}::region", _fake, lib=_library)
