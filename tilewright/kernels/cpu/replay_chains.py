"""Chains: steps of a program that threads take image by image instead of each step for the whole batch.

A step that reads and writes more than a second-level cache holds leaves its result to a slower cache or to memory, and
the next fetches it from there. A thread that takes one image through several steps finds it in its own cache. In turn
it reads the weights of all of these steps anew for each image, so a chain is as long as its weights fit that cache
beside an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tilewright.kernels.cpu import steps
from tilewright.kernels.cpu.memory import cache_bytes
from tilewright.kernels.cpu.steps import Description

if TYPE_CHECKING:
    from tilewright.kernels.cpu.replay_plan import Part

#: Steps whose operands are images, each of which is computed from the same image of the other operands.
_OF_IMAGES = frozenset(range(steps.MARK + 1))
_CONVOLUTIONS = (steps.CONV, steps.DEPTHWISE, steps.WINOGRAD)
#: Operands by their bits in ``Description.in_slot``; see program.h.
_OPERANDS = {"x": 1, "residual": 2, "y": 4, "marks": 8}
#: Where a system does not say how large the second-level cache is.
_LIKELY_CACHE = 1 << 20


class Chain(NamedTuple):
    """Groups of calls ``first`` to ``last``, whose steps are taken image by image."""

    first: int
    last: int
    images: int


def chains_of(parts: Sequence[Part], threads: int, cache: int | None = None) -> list[Chain]:
    """The chains that pay; steps of a band stay together. cache: bytes of the second-level cache of a core; of this
    machine where None.
    """
    cache = cache or cache_bytes(2) or _LIKELY_CACHE
    found: list[Chain] = []
    for part in parts:
        chain = _Growing(threads, cache)
        banded = {
            group
            for number, step in enumerate(part.steps)
            for group in part.groups[number : number + step.band if step.band > 1 else number]
        }
        for group, made in _by_group(part):
            found += chain.end() if group in banded else chain.take(group, made)
        found += chain.end()
    return found


def set_chains(parts: Sequence[Part], chains: Sequence[Chain], slots: tuple[int, int], slot_bytes: int) -> None:
    """Let steps run as ``chains`` say. slots: where the memory for one image of the first thread begins and ends."""
    by_first = {chain.first: chain for chain in chains}
    for part in parts:
        chain, first, begun = None, None, -1
        for group, step in zip(part.groups, part.steps, strict=True):
            if group in by_first and group != begun:
                chain, first, begun = by_first[group], step, group
            if chain is None or first is None or group > chain.last:
                continue
            first.chain += 1
            step.slot_bytes = slot_bytes
            for name, bit in _OPERANDS.items():
                if slots[0] <= (getattr(step, name) or 0) < slots[1]:
                    step.in_slot |= bit


class _Growing:
    """The chain that the steps met last may become."""

    def __init__(self, threads: int, cache: int):
        self.threads, self.cache = threads, cache
        self.groups: list[tuple[int, int]] = []  # number, steps
        self.images = self.weights = self.useful = 0

    def take(self, group: int, made: list[Description]) -> Iterator[Chain]:
        """Add the steps of a group; gives the chain that ends before it, if one does."""
        images = _images_of(made)
        weights = sum(map(_weight_bytes, made))
        if images < max(2, self.threads) or weights > self.cache // 2:
            yield from self.end()
            return
        if images != self.images or self.weights + weights > self.cache // 2:
            yield from self.end()
        overflows = max(map(image_bytes, made)) * images > self.cache * self.threads
        if not self.groups and not overflows:
            return
        self.images, self.weights = images, self.weights + weights
        self.groups.append((group, len(made)))
        if overflows:
            self.useful = len(self.groups)

    def end(self) -> Iterator[Chain]:
        """The chain up to the last step that gains by it, if it has two."""
        groups = self.groups[: self.useful]
        if sum(count for _, count in groups) > 1:
            yield Chain(groups[0][0], groups[-1][0], self.images)
        self.groups, self.images, self.weights, self.useful = [], 0, 0, 0


def _by_group(part: Part) -> Iterator[tuple[int, list[Description]]]:
    made: list[Description] = []
    for index, step in enumerate(part.steps):
        made.append(step)
        if index + 1 == len(part.steps) or part.groups[index + 1] != part.groups[index]:
            yield part.groups[index], made
            made = []


def _images_of(made: list[Description]) -> int:
    """How many images all of these steps take one by one; 0 if some do not."""
    images = {step.batch if step.kind in _OF_IMAGES and step.marks_count in (0, step.batch) else 0 for step in made}
    return images.pop() if len(images) == 1 else 0


def _size(type_number: int) -> int:
    return 4 if type_number == steps.FLOAT32 else 1


def image_bytes(step: Description) -> int:
    """What a step of images reads and writes for each image, without weights."""
    x = step.height * step.width * step.channels * _size(step.x_type)
    y = step.out_height * step.out_width * step.out_channels
    residual = 0 if not step.residual else step.channels if step.kind == steps.MULTIPLY else y
    return int(x + y * _size(step.y_type) + residual * _size(step.r_type))


def _weight_bytes(step: Description) -> int:
    if step.kind not in _CONVOLUTIONS:
        return 0
    taps = 16 if step.kind == steps.WINOGRAD else step.kernel_height * step.kernel_width
    return int(step.out_channels * step.channels // step.groups * taps * _size(step.x_type))
