"""Runs a recorded sequence of operators again as a few C calls: what a CUDA graph is on a GPU, for networks on a CPU.

    fast = Replays(function)
    y = fast(x)                  # what function(x) returns

The second call for inputs of the same shapes is recorded, operator by operator; those that the C kernels know become
steps (``conv_steps``) in memory that is planned once, the others are called from Python in their place. Where nothing
is gained, or the replay does not give what the recorded call gave, ``function`` is called as before and ``why_not``
says so. ``function`` must do the same operators whenever shapes are the same: a traced graph does.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tilewright.kernels.cpu import native
from tilewright.kernels.cpu import steps as conv_steps
from tilewright.kernels.cpu.recording import Call, record, tensors_in, written_by
from tilewright.kernels.cpu.replay_steps import NATIVE, Lowering, NotNative
from tilewright.kernels.cpu.steps import Description
from tilewright.kernels.dispatch.derivatives import is_transformed
from tilewright.kernels.dispatch.same import SameTensors, holds_values, version_of

#: Replays kept for one function: one for each combination of input shapes.
MOST_REPLAYS = 8
#: Other kinds of tensors need not have memory.
_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


class CannotReplay(Exception):
    """Why a recording cannot be replayed, in words."""


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Replay:
    """One recording, made ready to run for inputs of the recorded shapes and strides. Raises CannotReplay.

    calls, result: what ``record`` gave. watched: tensors that somebody else has an eye on.
    """

    def __init__(
        self,
        calls: list[Call],
        result: Any,
        inputs: tuple[torch.Tensor, ...],
        watched: Sequence[torch.Tensor | None] = (),
    ):
        self.watched = {_storage(tensor) for tensor in watched if tensor is not None}
        self.lock = threading.Lock()
        made: set[int] = set()
        calls = [call for call in calls if not self._is_view(call, made)]
        self._place(calls, inputs, result)
        self._lower(calls)
        if not self.native_steps:
            raise CannotReplay("no operator of it has a C kernel")
        leaves, self.structure = pytree.tree_flatten(result)
        self.leaves = [self._live(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

    @staticmethod
    def _is_view(call: Call, made: set[int]) -> bool:
        """Whether the call computes nothing: it looks at memory that is there. Raises CannotReplay.

        made: storages that calls before it have made, to which those of this one are added.
        """
        if call.name in ("aten.dropout.default", "aten.dropout_.default") and not call.args[2]:
            return True
        if any(_storage(tensor) not in made for tensor in written_by(call)):
            raise CannotReplay(f"{call.name} writes to what the recorded function did not make itself")
        results = tensors_in(call.result)
        sources = {_storage(tensor) for tensor in tensors_in((call.args, call.kwargs))}
        if results and all(_storage(tensor) in sources for tensor in results):
            return not written_by(call)
        made |= {_storage(tensor) for tensor in results}
        if torch.Tag.nondeterministic_seeded in getattr(call.function, "tags", ()):
            raise CannotReplay(f"{call.name} is random")
        return False

    # ---- memory
    def _place(self, calls: list[Call], inputs: tuple[torch.Tensor, ...], result: Any) -> None:
        """Give what the calls make a place in one arena, which is free again after the last call that reads it."""
        self.inputs = {_storage(x): torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in inputs}
        #: Where each input began in its storage, of which it may be a part.
        self.offsets = {_storage(x): x.storage_offset() for x in inputs}
        if len(self.inputs) != len(inputs):
            raise CannotReplay("two inputs share memory")
        if any(stride == 0 and size > 1 for x in inputs for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise CannotReplay("an input is expanded")
        born: dict[int, int] = {}
        dies: dict[int, int] = {}
        size: dict[int, int] = {}
        constants: dict[int, torch.Tensor] = {}
        for number, call in enumerate(calls):
            for tensor in tensors_in((call.args, call.kwargs)):
                key = _storage(tensor)
                if key in born:
                    dies[key] = number
                elif key not in self.inputs:
                    # A view, as of a transposed weight, is made anew in each call; what it looks at stays.
                    owner = tensor._base if tensor._is_view() and tensor._base is not None else tensor
                    constants[id(owner)] = owner
            for tensor in tensors_in(call.result):
                key = _storage(tensor)
                if key not in self.inputs:
                    born.setdefault(key, number)
                    dies.setdefault(key, number)
                    size[key] = tensor.untyped_storage().nbytes()
        for tensor in tensors_in(result):
            if _storage(tensor) not in born:
                raise CannotReplay("it returns an input or a constant")
            dies[_storage(tensor)] = len(calls)
        others = [t for t in constants.values() if version_of(t) >= 0 and _storage(t) not in self.watched]
        self.constants, self.same = list(map(weakref.ref, others)), SameTensors(others)
        live: list[tuple[int, int, int]] = []  # begin, end, last use
        self.places: dict[int, int] = {}
        total = 0
        for key in sorted(born, key=born.__getitem__):
            live = sorted(each for each in live if each[2] >= born[key])
            begin = 0
            for used_begin, used_end, _ in live:
                if begin + size[key] <= used_begin:
                    break
                begin = max(begin, used_end)
            end = begin + (size[key] + 63) // 64 * 64
            live.append((begin, end, dies[key]))
            self.places[key] = begin
            total = max(total, end)
        self.arena = torch.empty(total, dtype=torch.uint8)

    def _live(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where a recorded tensor is found in a replay."""
        key = _storage(tensor)
        if key in self.places:
            offset = self.places[key] // tensor.element_size() + tensor.storage_offset()
            empty = torch.empty(0, dtype=tensor.dtype)
            return empty.set_(self.arena.untyped_storage(), offset, tensor.shape, tensor.stride())
        if key in self.inputs:
            offset = tensor.storage_offset() - self.offsets[key]
            if offset < 0:
                raise CannotReplay("it looks at memory in front of its input")
            return self.inputs[key].as_strided(tensor.shape, tensor.stride(), offset)
        return tensor

    # ---- steps
    def _lower(self, calls: list[Call]) -> None:
        plan = Lowering(self._live)
        parts: list[list[Description] | Callable[[], None]] = []
        self.native_steps = 0
        self.python_steps: list[str] = []
        for call in calls:
            lower = NATIVE.get(call.name)
            try:
                if lower is None:
                    raise NotNative(call.name)
                made = lower(plan, *call.args, result=call.result, **call.kwargs)
            except NotNative:
                plan.clear_signs([*tensors_in(call.result), *written_by(call)])
                parts.append(self._python_step(call))
                self.python_steps.append(call.name)
                continue
            self.native_steps += 1
            last = parts[-1] if parts else None
            if isinstance(last, list):
                last += made
            else:
                parts.append(made)
        self.kept = plan.kept
        self.steps: list[Any] = []
        #: Descriptions whose x is an input, which need not be copied: (description, address in the copy, input).
        for part in parts:
            if callable(part):
                self.steps.append(part)
            else:
                array = (Description * len(part))(*part)
                self.steps.append((ctypes.addressof(array), len(part), array))
        self.patches, self.copied = self._find_inputs()

    def _python_step(self, call: Call) -> Callable[[], None]:
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._live, (call.args, call.kwargs))
        places = [self._live(tensor) for tensor in tensors_in(call.result)]

        def step() -> None:
            for place, tensor in zip(places, tensors_in(call.function(*args, **kwargs)), strict=True):
                if tensor.data_ptr() != place.data_ptr():  # or it was written in place
                    place.copy_(tensor)

        return step

    def _find_inputs(self) -> tuple[list[tuple[Description, int, int]], list[int]]:
        """The steps that read an input as their x, and the inputs that others read, which must be copied."""
        spans = [(x.data_ptr(), x.data_ptr() + x.untyped_storage().nbytes()) for x in self.inputs.values()]
        patches = []
        copied = set(range(len(spans)) if self.python_steps else ())
        for description in itertools.chain.from_iterable(step[2] for step in self.steps if isinstance(step, tuple)):
            for number, (begin, end) in enumerate(spans):
                if begin <= (description.x or 0) < end:
                    patches.append((description, description.x - begin, number))
                if begin <= (description.residual or 0) < end:
                    copied.add(number)
        return patches, sorted(copied)

    # ---- running
    def is_current(self) -> bool:
        """Whether no constant that nobody else watches was replaced or written to since the recording."""
        return self.same.match([reference() for reference in self.constants])

    def __call__(self, inputs: tuple[torch.Tensor, ...]) -> Any:
        """The result for ``inputs``, in tensors of its own. The caller holds ``lock``."""
        own = list(self.inputs.values())
        for number in self.copied:
            own[number].copy_(inputs[number])
        for description, offset, number in self.patches:
            description.x = inputs[number].data_ptr() + offset
        function, threads = native.function("run_steps"), torch.get_num_threads()
        for step in self.steps:
            if isinstance(step, tuple):
                function(step[0], step[1], threads)
            else:
                step()
        leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.structure)


def _same(a: Any, b: Any) -> bool:
    """Whether two results are equal but for the rounding of float32."""
    ours, theirs = tensors_in(a), tensors_in(b)
    return len(ours) == len(theirs) and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.allclose(x.double(), y.double(), 1e-2, _atol(y), True)
        for x, y in zip(ours, theirs, strict=True)
    )


def _atol(tensor: torch.Tensor) -> float:
    finite = tensor.double()[tensor.isfinite()]
    return 1e-3 * finite.abs().max().item() if finite.numel() else 0.0


class Replays:
    """``function`` of CPU tensors, replayed wherever that gives the same.

    state: called each time; replays are made anew when what it returns changes. Numbers that ``function`` reads from
    modules are part of a recording, so whoever changes such numbers must change the state. tensors: called each time
    too; replays are made anew when one of the tensors it returns was replaced or written to. Others are noticed when
    ``function`` alone held them.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        state: Callable[[], Hashable] = lambda: None,
        tensors: Callable[[], Sequence[torch.Tensor | None]] = tuple,
    ):
        self.function, self.state, self.tensors = function, state, tensors
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
        for x in inputs:
            if type(x) is not torch.Tensor or x.device.type != "cpu" or not holds_values(x):
                return self.function(*inputs)
            if x.requires_grad and torch.is_grad_enabled():
                return self.function(*inputs)
        if is_special():
            return self.function(*inputs)
        same, known = self._known
        if not same.match(tensors := self.tensors()):  # which this call keeps alive until the kernels have read them
            if any(type(tensor) not in _PLAIN for tensor in tensors):
                return self.function(*inputs)
            known = {}
            self._known = (SameTensors(tensors), known)
        key = (self.state(), *[(x.shape, x.stride(), x.dtype) for x in inputs])
        replay = known.get(key)
        if isinstance(replay, str):
            return self.function(*inputs)
        if not isinstance(replay, Replay):
            return self._record(known, key, inputs, tensors)
        if not replay.is_current():
            known.pop(key, None)
            return self.function(*inputs)
        if not replay.lock.acquire(blocking=False):  # another thread is in its memory
            return self.function(*inputs)
        try:
            return replay(inputs)
        finally:
            replay.lock.release()

    def _record(
        self,
        known: dict[Hashable, Replay | int | str],
        key: Hashable,
        inputs: tuple[torch.Tensor, ...],
        tensors: Sequence[torch.Tensor | None],
    ) -> Any:
        if conv_steps.why_no_kernels():
            known[key] = str(conv_steps.why_no_kernels())
            return self.function(*inputs)
        if key not in known:
            if len(known) >= MOST_REPLAYS:
                known.clear()
            known[key] = 1
            return self.function(*inputs)
        # What is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            calls, result = record(self.function, inputs)
            try:
                replay = Replay(calls, result, inputs, tensors)
                with replay.lock:
                    replayed = replay(inputs)
            except CannotReplay as error:
                known[key] = str(error)
                return result
        del calls  # of the tensors in it, those that the function made must not outlive it
        if not _same(replayed, result):
            known[key] = "a replay does not give the recorded result"
        elif not replay.is_current():
            known[key] = "it makes tensors from nothing in each call"
        else:
            known[key] = replay
            return replayed  # whose last bits are those of the calls to come
        return result


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
