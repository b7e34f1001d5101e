"""Whether a graph computes what the code that it was read from computes, on one input.

Results may differ by the order in which floats are added. How much that is worth depends on the network: one that
rounds, compares or divides turns the last bit into more. So where results differ by more than the order of additions
in a layer explains, the code runs again on nearby inputs, a few times at most, and the difference may be as large as a
multiple of what that makes of the results. Nearby is farther away than rounding: where a step turns it is few numbers
that do.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tilewright.convert.state import private_copy
from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.derivatives import is_transformed

#: (inputs) -> result; may write to the inputs.
Run = Callable[[tuple[Any, ...]], Any]
#: Relative difference that needs no explanation: the larger of this and of so many units in the last place.
_LEAST, _ULPS = 1e-4, 10.0
#: How far inputs are moved to see what rounding may do: relative, or in units in the last place. And how many times.
_MOVED_BY, _MOVED_ULPS, _RUNS = 1e-4, 4.0, 3
#: As many samples of a batch do for a rehearsal: two tell what is taken over a batch from what is taken of each.
_SAMPLES = 2
#: What multiple of the difference that this makes is fine.
_MULTIPLE = 3.0


def why_differs(found: Any, expected: Any, run: Run, given: tuple[Any, ...]) -> str | None:
    """In words; None where rounding explains it. expected: the ``outcome`` of ``run`` for ``given``."""
    eps = _rounding_of([found, expected, given])
    explained = max(_LEAST, _ULPS * eps)
    distance = difference(found, expected)
    if isinstance(distance, str) or distance <= explained:
        return distance if isinstance(distance, str) else None
    generator = torch.Generator().manual_seed(0)
    for _ in range(_RUNS):
        nearby = _nearby(given, max(_MOVED_BY, _MOVED_ULPS * eps), generator)
        other = difference(outcome(run, nearby), expected)
        explained = max(explained, _MULTIPLE * (math.inf if isinstance(other, str) else other))
        if distance <= explained:
            return None
    return f"results differ by {distance:.2g} of their size, where rounding explains {explained:.2g}"


def outcome(run: Run, given: tuple[Any, ...]) -> Any:
    """The result, and what the inputs are afterwards."""
    result = run(given)
    return result, given


def difference(a: Any, b: Any) -> float | str:
    """The largest relative difference of two tensors in the same place, in words if something else differs."""
    (ours, spec), (theirs, other_spec) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    if spec != other_spec:
        return "the result has another structure"
    worst = 0.0
    for x, y in zip(ours, theirs, strict=True):
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            if type(x) is not type(y) or (isinstance(x, (bool, int, str)) and x != y):
                return f"the result holds {x!r} in place of {y!r}"
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"the result is {x.dtype} {list(x.shape)} in place of {y.dtype} {list(y.shape)}"
        worst = max(worst, _distance(x, y))
    return worst


def _distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Of the root mean square of ``y``; of numbers that are not finite, or whole, the share that differs."""
    if not x.numel():
        return 0.0
    if not (x.is_floating_point() or x.is_complex()):
        return float((x != y).double().mean())
    if x.is_complex():
        x, y = torch.view_as_real(x.resolve_conj()), torch.view_as_real(y.resolve_conj())
    x, y = x.detach().double(), y.detach().double()
    finite = x.isfinite() & y.isfinite()
    other = ~finite & ~((x == y) | (x.isnan() & y.isnan()))
    x, y = torch.where(finite, x, 0), torch.where(finite, y, 0)
    error, size = (float(each.square().mean().sqrt()) for each in (x - y, y))
    return max(float(other.double().mean()), error / (size or 1e-3))


def _rounding_of(tree: Any) -> float:
    """The machine epsilon of the narrowest float among tensors, or in which they are multiplied."""
    leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    kinds = {leaf.dtype for leaf in leaves if leaf.is_floating_point() or leaf.is_complex()} | {torch.float32}
    devices = {leaf.device.type for leaf in leaves}
    kinds |= {torch.get_autocast_dtype(each) for each in devices if torch.is_autocast_enabled(each)}
    eps = max(torch.finfo(kind).eps for kind in kinds)
    return max(eps, 2.0**-11) if "cuda" in devices and torch.backends.cudnn.allow_tf32 else eps


_rehearsing = threading.local()


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Inside, calls are not those of a user, and a proof on the first samples of a batch is enough for this thread."""
    before, _rehearsing.now = is_rehearsal(), True
    try:
        yield
    finally:
        _rehearsing.now = before


def is_rehearsal() -> bool:
    """Whether this thread is in a ``rehearsal``."""
    return getattr(_rehearsing, "now", False)


def first_samples(given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The first two samples of a batch that all of ``given`` hold; None if they are no such batch, or a small one.

    A graph in which something depends on the size of the batch says so by what it expects, and is not run on another.
    """
    sizes = {len(x) if isinstance(x, torch.Tensor) and x.dim() > 1 else 0 for x in given}
    if len(sizes) != 1 or min(sizes) <= _SAMPLES:
        return None
    return tuple(x[:_SAMPLES] for x in given)


def _nearby(given: tuple[Any, ...], by: float, generator: torch.Generator) -> tuple[Any, ...]:
    """``given`` with every float changed a little."""
    copied = private_copy(given)
    for x in pytree.tree_leaves(copied):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            noise = torch.rand(x.shape, generator=generator).mul_(2).sub_(1).to(x.device)
            x.copy_(x.double() * (1 + by * noise))
    return copied


def may_run(given: Sequence[Any]) -> bool:
    """Whether a second run on these inputs means something: real tensors, and nobody who watches what is called."""
    leaves = pytree.tree_leaves(list(given))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    plain = all(leaf is None or isinstance(leaf, (torch.Tensor, bool, int, float, str)) for leaf in leaves)
    real = all(type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta for x in tensors)
    return (
        plain
        and real
        and all(x.layout == torch.strided for x in tensors)
        and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        and torch._C._len_torch_dispatch_stack() == 0
        and not is_transformed()
        and torch._C._get_tracing_state() is None
        and not router.records_problems()  # the layers pose others than the program
    )
