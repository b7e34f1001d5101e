"""Where the tensors of a recording lie when it runs again: inputs, constants, and one arena for what calls make."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from tilewright.kernels.cpu.recording import HOLDER, Call, tensors_in
from tilewright.kernels.cpu.replay_chains import Chain
from tilewright.kernels.dispatch.same import SameTensors, version_of


class CannotReplay(Exception):
    """Why a recording cannot be replayed, in words."""


def storage_key(tensor: torch.Tensor) -> int:
    """The same for all tensors that look at one piece of memory."""
    return tensor.untyped_storage().data_ptr()


class Memory:
    """What groups of calls make gets a place in one arena, which is free again after the last group that reads it.
    Raises CannotReplay.

    groups: calls that run together, in order. watched, held: storages that somebody else has an eye on, and of what the
    holder gives. free: storages of inputs that are of any size, with their numbers. together: numbers of groups that
    may run at the same time, of which none may write where another reads. chains: groups whose steps so many threads
    take image by image: what they alone read lies in slots, one image of it for each thread.
    """

    def __init__(
        self,
        groups: list[list[Call]],
        inputs: tuple[torch.Tensor, ...],
        result: Any,
        *,
        watched: Collection[int],
        free: Mapping[int, int],
        held: Collection[int],
        together: Sequence[range] = (),
        chains: Sequence[Chain] = (),
        threads: int = 1,
    ):
        fixed = {number: x for number, x in enumerate(inputs) if number not in free.values()}
        self.inputs = {storage_key(x): torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in fixed.values()}
        self.numbers = list(fixed)
        #: Where each input began in its storage, of which it may be a part.
        self.offsets = {storage_key(x): x.storage_offset() for x in fixed.values()}
        if len(self.inputs) != len(fixed):
            raise CannotReplay("two inputs share memory")
        if any(
            stride == 0 and size > 1 for x in fixed.values() for size, stride in zip(x.shape, x.stride(), strict=True)
        ):
            raise CannotReplay("an input is expanded")
        born: dict[int, int] = {}
        dies: dict[int, int] = {}
        size: dict[int, int] = {}
        constants: dict[int, torch.Tensor] = {}
        for number, call in ((number, call) for number, group in enumerate(groups) for call in group):
            for tensor in tensors_in((call.args, call.kwargs)):
                key = storage_key(tensor)
                if key in born:
                    # What a holder is given may be written to what it holds only where that is read, in the next group.
                    dies[key] = number + (call.name == HOLDER)
                elif key not in self.inputs and key not in held and key not in free:
                    # A view, as of a transposed weight, is made anew in each call; what it looks at stays.
                    owner = tensor._base if tensor._is_view() and tensor._base is not None else tensor
                    constants[id(owner)] = owner
            for tensor in tensors_in(call.result):
                key = storage_key(tensor)
                if key not in self.inputs and key not in held:
                    born.setdefault(key, number)
                    dies.setdefault(key, number)
                    size[key] = tensor.untyped_storage().nbytes()
        for tensor in tensors_in(result):
            if storage_key(tensor) not in born:
                raise CannotReplay("it returns an input or a constant")
            dies[storage_key(tensor)] = len(groups)
        others = [t for t in constants.values() if version_of(t) >= 0 and storage_key(t) not in watched]
        self._constants, self._same = list(map(weakref.ref, others)), SameTensors(others)
        first = {number: each[0] for each in together for number in each}
        last = {number: each[-1] for each in together for number in each}
        lives = {key: (first.get(born[key], born[key]), last.get(dies[key], dies[key])) for key in born}
        self.last_use = dies
        self._arrange(lives, size, chains, threads)

    def _arrange(
        self, lives: dict[int, tuple[int, int]], size: dict[int, int], chains: Sequence[Chain], threads: int
    ) -> None:
        """Give each storage its place. lives: first and last group."""
        #: Of storages in slots the bytes of one image.
        inner = self._of_image = dict[int, int]()
        for chain in chains:
            for key, (born, dies) in lives.items():
                if chain.first <= born and dies <= chain.last:
                    inner[key] = -(-size[key] // chain.images)
                elif born <= chain.last and dies >= chain.first:  # some images are done before others begin
                    lives[key] = min(born, chain.first), max(dies, chain.last)
        self.places, total = _places({key: life for key, life in lives.items() if key not in inner}, size)
        in_slot, self.slot_bytes = _places({key: lives[key] for key in inner}, inner)
        self.places |= {key: total + place for key, place in in_slot.items()}
        #: Tensors of whole batches must not end behind the arena, even if all but one image of them is never touched.
        end = max([total + self.slot_bytes * threads, *(self.places[key] + size[key] for key in inner)])
        self.arena = torch.empty(end, dtype=torch.uint8)
        self.slots = (self.arena.data_ptr() + total, self.arena.data_ptr() + total + self.slot_bytes)

    def live(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where a recorded tensor is found in a replay."""
        key = storage_key(tensor)
        if key in self.places:
            if key in self._of_image and not _is_batch(tensor, self._of_image[key]):
                raise CannotReplay("what a chain makes is no batch of images")
            offset = self.places[key] // tensor.element_size() + tensor.storage_offset()
            empty = torch.empty(0, dtype=tensor.dtype)
            return empty.set_(self.arena.untyped_storage(), offset, tensor.shape, tensor.stride())
        if key in self.inputs:
            offset = tensor.storage_offset() - self.offsets[key]
            if offset < 0:
                raise CannotReplay("it looks at memory in front of its input")
            return self.inputs[key].as_strided(tensor.shape, tensor.stride(), offset)
        return tensor

    def is_current(self) -> bool:
        """Whether no constant that nobody else watches was replaced or written to since the recording."""
        return not self._constants or self._same.match([reference() for reference in self._constants])


def _is_batch(tensor: torch.Tensor, image: int) -> bool:
    """Whether images ``image`` bytes long follow each other, and what the tensor has of the first lies in that."""
    first = (
        1
        + tensor.storage_offset()
        + sum((n - 1) * s for n, s in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
    )
    return tensor.stride(0) * tensor.element_size() == image >= first * tensor.element_size()


def _places(lives: Mapping[int, tuple[int, int]], size: Mapping[int, int]) -> tuple[dict[int, int], int]:
    """Where storages begin, and how many bytes there are in all."""
    keys = sorted(lives, key=lambda key: lives[key][0])
    begins, total = arrange((*lives[key], size[key]) for key in keys)
    return dict(zip(keys, begins, strict=True)), total


def arrange(lives: Iterable[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Where each of some pieces of memory begins, and how much there is in all, so that those which live at the same
    time lie apart. lives: of each the first and the last moment, and its bytes; the first ones in order.
    """
    live: list[tuple[int, int, int]] = []  # begin, end, last use
    begins, total = [], 0
    for born, dies, size in lives:
        live = sorted(each for each in live if each[2] >= born)
        begin = 0
        for used_begin, used_end, _ in live:
            if begin + size <= used_begin:
                break
            begin = max(begin, used_end)
        end = begin + (size + 63) // 64 * 64
        live.append((begin, end, dies))
        begins.append(begin)
        total = max(total, end)
    return begins, total
