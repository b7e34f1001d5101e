"""Runs a recorded sequence of operators again as a few C calls: what a CUDA graph is on a GPU, for networks on a CPU.

    fast = Replays(function)
    y = fast(x)                  # what function(x) returns

The second call for inputs of the same shapes is recorded, operator by operator; those that the C kernels know become
steps (``conv_steps``) in memory that is planned once, the others are called from Python in their place. Where nothing
is gained, or the replay does not give what the recorded call gave, ``function`` is called as before and ``why_not``
says so. ``function`` must do the same operators whenever shapes are the same: a traced graph does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from tilewright.kernels.cpu import steps as conv_steps
from tilewright.kernels.cpu.recording import Call, record, tensors_in
from tilewright.kernels.cpu.replay_chains import chains_of
from tilewright.kernels.cpu.replay_checks import is_same
from tilewright.kernels.cpu.replay_memory import CannotReplay
from tilewright.kernels.cpu.replay_plan import Replay
from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.derivatives import is_transformed
from tilewright.kernels.dispatch.same import SameTensors, holds_values

#: Replays kept for one function: one for each combination of input shapes.
MOST_REPLAYS = 8
#: Bytes of memory that all of these work in, but for the last one made.
MOST_BYTES = 128 << 20
#: Other kinds of tensors need not have memory.
_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


class Replays:
    """``function`` of CPU tensors, replayed wherever that gives the same.

    state: called each time; replays are made anew when what it returns changes. Numbers that ``function`` reads from
    modules are part of a recording, so whoever changes such numbers must change the state. tensors: called each time
    too; replays are made anew when one of the tensors it returns was replaced or written to. Others are noticed when
    ``function`` alone held them. free: numbers of inputs that may have any size, since ``function`` gives them to
    nothing but functions that read what a holder gave (``recording``).
    """

    def __init__(
        self,
        function: Callable[..., Any],
        state: Callable[[], Hashable] = lambda: None,
        tensors: Callable[[], Sequence[torch.Tensor | None]] = tuple,
        most: int = MOST_REPLAYS,
        free: frozenset[int] = frozenset(),
    ):
        self.function, self.state, self.tensors, self.most, self.free = function, state, tensors, most, free
        #: What the replays were made of, and the replays: exchanged together, so that a thread which records while
        #: another replaces tensors puts what it has made of the old ones where nobody looks any more.
        self._known: tuple[SameTensors, dict[Hashable, Replay | int | str]] = (SameTensors(()), {})

    @property
    def replays(self) -> list[Replay]:
        """Those that are in use."""
        return [each for each in list(self._known[1].values()) if isinstance(each, Replay)]

    @property
    def why_not(self) -> str | None:
        """Why the shapes met last are not replayed; None if they are or were not met twice yet."""
        reasons = [each for each in list(self._known[1].values()) if isinstance(each, str)]
        return reasons[-1] if reasons else None

    def __call__(self, *inputs: Any) -> Any:
        """What ``function(*inputs)`` returns."""
        return self.run(inputs, None)

    def run(self, inputs: tuple[Any, ...], holder: Any) -> Any:
        """What ``function(*inputs)`` returns, or ``function(*inputs, holder)`` where there is one."""
        for x in inputs:
            if type(x) is not torch.Tensor or x.device.type != "cpu" or not holds_values(x):
                return self._called(inputs, holder)
            if x.requires_grad and torch.is_grad_enabled():
                return self._called(inputs, holder)
        if is_special():
            return self._called(inputs, holder)
        same, known = self._known
        if not same.match(tensors := self.tensors()):  # which this call keeps alive until the kernels have read them
            if any(type(tensor) not in _PLAIN for tensor in tensors):
                return self._called(inputs, holder)
            known = {}
            self._known = (SameTensors(tensors), known)
        key = (
            self.state(),
            router.generation(),
            torch.get_num_threads(),
            *[
                (x.dim(), x.dtype) if number in self.free else (x.shape, x.stride(), x.dtype)
                for number, x in enumerate(inputs)
            ],
        )
        replay = known.get(key)
        if isinstance(replay, str):
            return self._called(inputs, holder)
        if not isinstance(replay, Replay):
            return self._record(known, key, inputs, tensors, holder)
        if not replay.is_current():
            known.pop(key, None)
            return self._called(inputs, holder)
        if not replay.lock.acquire(blocking=False):  # another thread is in its memory
            return self._called(inputs, holder)
        try:
            return replay(inputs, holder)
        finally:
            replay.lock.release()

    def _called(self, inputs: tuple[Any, ...], holder: Any) -> Any:
        return self.function(*inputs) if holder is None else self.function(*inputs, holder)

    def _record(
        self,
        known: dict[Hashable, Replay | int | str],
        key: Hashable,
        inputs: tuple[torch.Tensor, ...],
        tensors: Sequence[torch.Tensor | None],
        holder: Any,
    ) -> Any:
        if conv_steps.why_no_kernels():
            known[key] = str(conv_steps.why_no_kernels())
            return self._called(inputs, holder)
        if key not in known:
            if len(known) >= self.most:
                known.clear()
            known[key] = 1
            return self._called(inputs, holder)
        # What is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            calls, result = record(self.function, inputs if holder is None else (*inputs, holder))
            try:
                replay = Replay(calls, result, inputs, tensors, self.free)
                with replay.lock:
                    reason = replay.why_wrong(inputs, calls)
                    # A holder must not be given the same twice.
                    replayed = result if reason or holder is not None else replay(inputs)
            except CannotReplay as error:
                known[key] = str(error)
                return result
            if reason is None and holder is None:
                replay = self._with_chains(replay, replayed, calls, result, inputs, tensors)
        replay.forget_recording()
        del calls  # of the tensors in it, those that the function made must not outlive it
        if reason:
            known[key] = reason
        elif not replay.is_current():
            known[key] = "it makes tensors from nothing in each call"
        else:
            if sum(each.size for each in list(known.values()) if isinstance(each, Replay)) > MOST_BYTES - replay.size:
                known.clear()
            known[key] = replay
            return replayed  # whose last bits are those of the calls to come
        return result

    def _with_chains(
        self,
        replay: Replay,
        replayed: Any,
        calls: list[Call],
        result: Any,
        inputs: tuple[torch.Tensor, ...],
        tensors: Sequence[torch.Tensor | None],
    ) -> Replay:
        """The same with steps taken image by image, where that pays and gives the bits that ``replay`` gave."""
        chains = chains_of(replay.parts, torch.get_num_threads())
        if not chains:
            return replay
        try:
            other = Replay(calls, result, inputs, tensors, self.free, chains)
        except CannotReplay:
            return replay
        with other.lock:
            found = other(inputs)
        same = all(map(is_same, tensors_in(found), tensors_in(replayed)))
        return other if same else replay


def is_special() -> bool:
    """Whether something watches or changes what operators do: a mode, autocast, a transformation, forward-mode AD, a
    compiler.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch.is_autocast_enabled("cpu")
        or is_transformed()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
    )
