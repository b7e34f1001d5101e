"""One recording made ready to run again: its calls become steps of C calls, or functions of Python between them."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tilewright.kernels.cpu import bands, native, steps
from tilewright.kernels.cpu.lowering import Lowering, NotNative, place_of
from tilewright.kernels.cpu.recording import HELD, HOLDER, Call, tensors_in, written_by
from tilewright.kernels.cpu.replay_cache import CachedAttention, Room
from tilewright.kernels.cpu.replay_chains import Chain, set_chains
from tilewright.kernels.cpu.replay_checks import is_near, is_same
from tilewright.kernels.cpu.replay_counts import storages_read
from tilewright.kernels.cpu.replay_memory import CannotReplay, Memory, arrange, storage_key
from tilewright.kernels.cpu.replay_norms import lower_rms_norm, read_rms_norm
from tilewright.kernels.cpu.replay_rows import ROWS, grouped
from tilewright.kernels.cpu.replay_steps import NATIVE
from tilewright.kernels.cpu.row_steps import one_thread_does, pointers_of, requantize
from tilewright.kernels.cpu.steps import Description

#: Recorded calls of which a step makes the first result alone.
_FIRST_RESULT = ("aten.native_layer_norm.default", "aten.max_pool2d_with_indices.default")


#: Steps that have the bits of the calls that they stand for.
_EXACT = (steps.RMS_NORM, steps.ELEMENTWISE)


@dataclass
class Part:
    """Steps that run one after the other: those of one C call, or a function of Python in their place.

    groups: for each step the number of the group of calls that it is of. made: for each step the calls whose results
    are there after it. one_thread: whether one thread alone has done all since threads last waited for each other.
    """

    made: list[list[Call]]
    steps: list[Description]
    function: Callable[[], None] | None = None
    array: Any = None
    one_thread: bool = False
    groups: list[int] = field(default_factory=list)

    def run(self, first: int, count: int, threads: int) -> None:
        """Some of the steps of a C call."""
        address = ctypes.addressof(self.array) + first * ctypes.sizeof(Description)
        native.function("run_steps")(address, count, threads)


class Replay:
    """One recording, made ready to run for inputs of the recorded shapes and strides, on as many threads as there were
    then. Raises CannotReplay.

    calls, result: what ``record`` gave. watched: tensors that somebody else has an eye on. free: numbers of inputs that
    are of any size. chains: groups of calls whose steps are taken image by image.
    """

    def __init__(
        self,
        calls: list[Call],
        result: Any,
        inputs: tuple[torch.Tensor, ...],
        watched: Sequence[torch.Tensor | None] = (),
        free: frozenset[int] = frozenset(),
        chains: Sequence[Chain] = (),
    ):
        #: What a call is given, while it runs: its holder, its inputs, and by what was recorded what its holder gave.
        self.holder: Any = None
        self.given: tuple[torch.Tensor, ...] = inputs
        self.held: dict[int, torch.Tensor] = {}
        #: Storages of what the recorded holder gave, and of inputs that are of any size; the latter with their numbers.
        self.held_storages: set[int] = set()
        self.free = {storage_key(inputs[number]): number for number in free}
        self.lock = threading.Lock()
        #: Of each step, once the recording is forgotten: storages of what its calls were given.
        self.sources: list[set[int]] = []
        made: set[int] = set()
        if self.free.keys() & {storage_key(x) for number, x in enumerate(inputs) if number not in free}:
            raise CannotReplay("two inputs share memory")
        groups = grouped([call for call in calls if not self._is_view(call, made)])
        together = bands.find(groups, result)
        self.memory = Memory(
            groups,
            inputs,
            result,
            watched={storage_key(tensor) for tensor in watched if tensor is not None},
            free=self.free,
            held=self.held_storages,
            together=together,
            chains=chains,
            threads=torch.get_num_threads(),
        )
        self._lower(groups, together)
        set_chains(self.parts, chains, self.memory.slots, self.memory.slot_bytes)
        if not self.native_steps:
            raise CannotReplay("no operator of it has a C kernel")
        leaves, self.structure = pytree.tree_flatten(result)
        self.leaves = [self.memory.live(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

    def _is_view(self, call: Call, made: set[int]) -> bool:
        """Whether the call computes nothing: it looks at memory that is there. Raises CannotReplay.

        made: storages that calls before it have made, to which those of this one are added.
        """
        if call.name in ("aten.dropout.default", "aten.dropout_.default") and not call.args[2]:
            return True
        if any(storage_key(tensor) not in made for tensor in written_by(call)):
            raise CannotReplay(f"{call.name} writes to what the recorded function did not make itself")
        results = tensors_in(call.result)
        sources = {storage_key(tensor) for tensor in tensors_in((call.args, call.kwargs))}
        if call.name == HOLDER:
            self.held_storages |= {storage_key(tensor) for tensor in results}
            if self.held_storages & (made | sources):
                raise CannotReplay("a holder gives what it was given")
            return False
        if call.name == HELD:
            if sources & {storage_key(tensor) for tensor in results}:
                raise CannotReplay("it returns what is held")
        elif sources & (self.held_storages | self.free.keys()):
            raise CannotReplay(f"{call.name} reads what has another size in each call")
        if results and all(storage_key(tensor) in sources for tensor in results):
            return not written_by(call)
        made |= {storage_key(tensor) for tensor in results}
        if torch.Tag.nondeterministic_seeded in getattr(call.function, "tags", ()):
            raise CannotReplay(f"{call.name} is random")
        return False

    # ---- steps
    def _lower(self, groups: list[list[Call]], together: Sequence[range]) -> None:
        plan = Lowering(self.memory.live, self.memory.last_use)
        self.parts: list[Part] = []
        self.native_steps = 0
        self.python_steps: list[str] = []
        #: Storages of inputs that functions of Python read.
        read: set[int] = set()
        #: The part that has the steps of each group, and where they end in it.
        ends: list[tuple[Part, int]] = []
        for plan.group, group in enumerate(groups):
            if not self._lower_group(plan, group):
                for call in group:
                    if len(group) > 1 and self._lower_group(plan, [call]):
                        continue
                    plan.forget([*tensors_in(call.result), *written_by(call)])
                    apart = call.name in (HOLDER, HELD)
                    function = self._step_with_holder(call) if apart else self._python_step(call)
                    self.parts.append(Part([[call]], [], function))
                    self.python_steps.append(call.name)
                    read |= {storage_key(tensor) for tensor in tensors_in((call.args, call.kwargs))}
            ends.append((self.parts[-1], len(self.parts[-1].steps)))
        for numbers in together:
            part, end = ends[numbers[-1]]
            # A step each but for the first group, which may begin with a copy of its input.
            if [ends[number] for number in numbers] == [(part, end - back) for back in reversed(range(len(numbers)))]:
                bands.mark(part.steps[end - len(numbers) : end])
        scratch = sorted(plan.scratch, key=lambda each: each.born)
        begins, total = arrange((each.born, each.dies[0], each.size) for each in scratch)
        self.scratch = torch.empty(total, dtype=torch.uint8)
        for each, begin in zip(scratch, begins, strict=True):
            for structure, name in each.members:
                setattr(structure, name, self.scratch.data_ptr() + begin)
        self.kept = plan.kept
        self._join_parts()
        #: How often the last call entered C.
        self.c_calls = sum(part.function is None for part in self.parts)
        for part in self.parts:
            if part.function is None:
                copies = list(part.array)  # objects that stand for parts of the array, whose memory they share
                for copy, step in zip(copies, part.steps, strict=True):
                    copy.described = step.described
                part.steps = copies
        #: Inputs that functions of Python read, and where.
        self.copied = [
            (place, number)
            for number, (key, place) in zip(self.memory.numbers, self.memory.inputs.items(), strict=True)
            if key in read
        ]
        self.patches = self._find_inputs()

    def _join_parts(self) -> None:
        """Put the steps of all C calls into one array; with what is between them, where that can be a step too."""
        native_parts = [part for part in self.parts if part.function is None]
        between = [part.made[0][0] for part in self.parts if part.function is not None]
        order = [part.function is not None for part in self.parts] == [False, True, True, False]
        self.cached: CachedAttention | None = None
        if order and [call.name for call in between] == [HOLDER, HELD]:
            with contextlib.suppress(NotNative, CannotReplay):
                self.cached = CachedAttention(between[0], between[1], self.memory.live, self._source)
        described = [list(part.steps) for part in native_parts]
        if self.cached is not None:
            described[0].append(self.cached.step)
        self.array = (Description * sum(map(len, described)))(*itertools.chain(*described))
        begin = 0
        for part, joined in zip(native_parts, described, strict=True):
            part.array = (Description * len(part.steps)).from_buffer(self.array, begin * ctypes.sizeof(Description))
            begin += len(joined)

    def _lower_group(self, plan: Lowering, group: list[Call]) -> bool:
        """Add the steps of calls that are lowered together; False, having added none, where one has no C kernel."""
        if len(group) > 1 and (norm := read_rms_norm(group)) is not None:
            plan.forget(tensors_in([call.result for call in group]))
            try:
                self._add_steps(plan.group, lower_rms_norm(plan, norm), len(group))
            except NotNative:
                return False
            return True
        if any(call.name not in NATIVE for call in group):
            return False
        made: list[tuple[Description, list[Call]]] = []
        absorbed = group[0] if len(group) > 1 and group[0].name not in ROWS else None
        for call in group:
            if call is absorbed:
                continue
            plan.forget([*tensors_in(call.result), *written_by(call)])
            plan.absorbed, plan.independent = absorbed, bool(made)
            try:
                described = NATIVE[call.name](plan, *call.args, result=call.result, **call.kwargs)
            except NotNative:
                return False
            made += [(each, []) for each in described]
            made[-1][1].append(call)
        if absorbed is not None and plan.is_read_later(absorbed.result):
            made[-1][1].append(absorbed)
        self._add_steps(plan.group, made, len(group))
        return True

    def _add_steps(self, group: int, made: list[tuple[Description, list[Call]]], calls: int) -> None:
        self.native_steps += calls
        if not self.parts or self.parts[-1].function is not None:
            self.parts.append(Part([], []))
        part = self.parts[-1]
        for step, results in made:
            alone = one_thread_does(step)
            if part.one_thread and alone:
                step.independent = True  # it is the same thread
            part.one_thread = alone and (part.one_thread or not step.independent)
            part.steps.append(step)
            part.groups.append(group)
            part.made.append(results)

    def _python_step(self, call: Call) -> Callable[[], None]:
        args, kwargs = pytree.tree_map_only(torch.Tensor, self.memory.live, (call.args, call.kwargs))
        places, function = [self.memory.live(tensor) for tensor in tensors_in(call.result)], call.function

        def step() -> None:
            for place, tensor in zip(places, tensors_in(function(*args, **kwargs)), strict=True):
                if tensor.data_ptr() != place.data_ptr():  # or it was written in place
                    place.copy_(tensor)

        return step

    def _step_with_holder(self, call: Call) -> Callable[[], None]:
        """A call of a function that is given, or gives, what a holder holds."""
        if tensors_in([each for each in (*call.args, *call.kwargs.values()) if not isinstance(each, torch.Tensor)]):
            raise CannotReplay(f"{call.name} is given tensors in a container")
        sources = [self._source(each) for each in call.args]
        named = {name: self._source(each) for name, each in call.kwargs.items()}
        numbers = [id(tensor) for tensor in tensors_in(call.result)]
        places = [] if call.name == HOLDER else [self.memory.live(tensor) for tensor in tensors_in(call.result)]
        function = call.function

        def held_step() -> None:
            given, options = [source() for source in sources], {name: source() for name, source in named.items()}
            for place, tensor in zip(places, _results(function(*given, **options)), strict=True):
                place.copy_(tensor)

        def step_of_holder() -> None:
            # It may keep what it is given, whose memory is used again.
            given = [source() for source in sources]
            own = [each.clone() if isinstance(each, torch.Tensor) else each for each in given]
            options = {name: source() for name, source in named.items()}
            self.held.update(zip(numbers, _results(function(self.holder, *own, **options)), strict=True))

        return step_of_holder if call.name == HOLDER else held_step

    def _source(self, argument: Any) -> Callable[[], Any]:
        """What gives, in a replay, what ``argument`` was in the recording."""
        if not isinstance(argument, torch.Tensor):
            return lambda: argument
        key = storage_key(argument)
        if key in self.held_storages:
            recorded = id(argument)
            return lambda: self.held[recorded]
        if key in self.free:
            number = self.free[key]
            if place_of(argument) != place_of(self.given[number]):
                raise CannotReplay("it looks at a part of an input that has another size in each call")
            return lambda: self.given[number]
        live = self.memory.live(argument)
        return lambda: live

    def _find_inputs(self) -> list[tuple[ctypes.Structure, str, int, int]]:
        """Where steps of the C kernels have the address of an input, which need not be copied: the structure, its
        member, how far into the input, and its number.
        """
        spans = [
            (number, x.data_ptr(), x.data_ptr() + x.untyped_storage().nbytes())
            for number, x in zip(self.memory.numbers, self.memory.inputs.values(), strict=True)
        ]
        return [
            (structure, name, address - begin, number)
            for step in self._all_steps()
            for structure, name, address in pointers_of(step)
            for number, begin, end in spans
            if begin <= address < end
        ]

    def _all_steps(self) -> list[Description]:
        described = [step for part in self.parts for step in part.steps]
        return described if self.cached is None else [*described, self.cached.step]

    # ---- running
    @property
    def size(self) -> int:
        """Bytes of memory that it works in."""
        return self.memory.arena.numel() + self.scratch.numel()

    def is_current(self) -> bool:
        """Whether no constant that nobody else watches was replaced or written to since the recording."""
        return self.memory.is_current()

    def _take(self, inputs: tuple[torch.Tensor, ...]) -> None:
        self.given = inputs
        for place, number in self.copied:
            place.copy_(inputs[number])
        for structure, name, offset, number in self.patches:
            setattr(structure, name, inputs[number].data_ptr() + offset)

    def __call__(self, inputs: tuple[torch.Tensor, ...], holder: Any = None) -> Any:
        """The result for ``inputs``, in tensors of its own. The caller holds ``lock``."""
        self._take(inputs)
        self.holder = holder
        threads = torch.get_num_threads()
        try:
            room = None if self.cached is None else self.cached.room_in(holder)
            if self.cached is not None and room is not None and self.cached.take(room):
                native.function("run_steps")(ctypes.addressof(self.array), len(self.array), threads)
                self.c_calls = 1
            else:
                self._run_parts(room, threads)
        finally:
            self._let_go()
        leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        if self.structure.is_leaf():
            return leaves[0]
        return pytree.tree_unflatten(leaves, self.structure)

    def _run_parts(self, room: Room | None, threads: int) -> None:
        """room: what the holder has given already, if it has."""
        self.c_calls = 0
        for part in self.parts:
            if part.function is None:
                part.run(0, len(part.steps), threads)
                self.c_calls += 1
            elif self.cached is not None and room is not None and part is self.parts[1]:
                self.held.update(self.cached.written(room))
            else:
                part.function()

    def _let_go(self) -> None:
        self.holder, self.given = None, ()
        self.held.clear()

    def why_wrong(self, inputs: tuple[torch.Tensor, ...], calls: Iterable[Call]) -> str | None:
        """What differs from the recording of ``calls`` on these inputs, in words, or None.

        Each step is given what was recorded of those before, so that no difference grows on the way.
        """
        self._take(inputs)
        threads = torch.get_num_threads()
        #: What is written to later is no longer what a call gave.
        last_written = {storage_key(tensor): id(call) for call in calls for tensor in written_by(call)}
        for part in self.parts:
            for number, made in enumerate(part.made):
                if made and made[0].name == HOLDER:  # which was called, and must not be again
                    self.held.update((id(tensor), tensor) for tensor in tensors_in(made[0].result))
                    continue
                if part.function is not None:
                    part.function()
                else:
                    part.run(number, 1, threads)
                for call in made:
                    tensors = tensors_in(call.result)[: 1 if call.name in _FIRST_RESULT else None]
                    for tensor in tensors:
                        if last_written.get(storage_key(tensor), id(call)) != id(call):
                            continue
                        place = self.memory.live(tensor)
                        exact = part.function is None and part.steps[number].kind in _EXACT
                        if not (is_same(place, tensor) if exact else is_near(place, tensor, call.name in ROWS)):
                            return f"a step of the replay does not give what {call.name} gave"
                        place.copy_(tensor)
                        if (first := _begin_of_band(part.steps, number)) is not None:
                            place.fill_(float("nan"))
                            part.run(first, number + 1 - first, threads)
                            if not is_near(place, tensor, False):
                                return f"steps that run together do not give what {call.name} gave"
                            place.copy_(tensor)
                attends = bool(made) and made[0].name == HELD
                if self.cached is not None and attends and not self.cached.is_right(made[0].result, self.held):
                    self.cached = None
                if part.function is None and (again := requantize(part.steps[number])) is not None:
                    native.function("run_steps")(ctypes.addressof(again), 1, threads)
        self._let_go()
        return None

    def forget_recording(self) -> None:
        """Let go of the calls, and so of all that they have made."""
        self.sources = storages_read(self.parts, self.cached is not None)
        for part in self.parts:
            part.made = []


def _begin_of_band(made: Sequence[Description], last: int) -> int | None:
    """Where the steps begin that run together with step number ``last`` as their last one."""
    return next((first for first in range(max(last - 2, 0), last) if made[first].band == last + 1 - first), None)


def _results(result: Any) -> Sequence[torch.Tensor]:
    """The tensors that a function gave, which gives one or a tuple of nothing else: quicker than ``tensors_in``."""
    return result if type(result) is tuple else (result,)
