"""What the functions that turn recorded operators into steps of the C kernels share."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from tilewright.kernels.cpu import steps as conv_steps
from tilewright.kernels.cpu.steps import Description


def storage_of(tensor: torch.Tensor) -> int:
    """What tells the memory of a recorded tensor from that of others."""
    return tensor.untyped_storage().data_ptr()


def place_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Two recorded tensors of one place are one."""
    return storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


class NotNative(Exception):
    """The C kernels do not take this call."""


class Scratch(NamedTuple):
    """Memory that steps of the groups ``born`` to ``dies`` share. members: where its address is to be written."""

    size: int
    born: int
    members: list[tuple[ctypes.Structure, str]]
    dies: list[int]

    def use(self, group: int, structure: ctypes.Structure, name: str) -> None:
        """A step of ``group`` reads or writes it, and finds it in this member."""
        self.members.append((structure, name))
        self.dies[0] = group


class Maker(NamedTuple):
    """A step that writes rows and can quantise them too. group: of calls, in which it is."""

    group: int
    rows: torch.Tensor
    job: Any


class Lowering:
    """What the functions share: where recorded tensors are found, what must stay alive, what is known.

    last_use: of the storages that calls make, the number of the group of calls that reads it last.
    """

    def __init__(self, live: Callable[[torch.Tensor], torch.Tensor], last_use: Mapping[int, int]):
        self.live = live
        self.kept: list[Any] = []
        self._last_use = last_use
        self._nonnegative: set[int] = set()
        #: Of the group that is lowered, and the call of it that the step of the last one takes over.
        self.group = 0
        self.absorbed: Any = None
        #: Whether the step to be made reads nothing that the one before writes.
        self.independent = False
        self.scratch: list[Scratch] = []
        #: What was quantised: by the tensor and the factors of its columns, the rows and their scales.
        self.quantized: dict[Any, tuple[Scratch, ...]] = {}
        #: The step that made a tensor of rows and can quantise them too, by its storage.
        self.makers: dict[int, Maker] = {}

    def image(self, recorded: torch.Tensor) -> torch.Tensor:
        """Where ``recorded`` is, as channels-last [N, C, H, W]; [N, C] has one pixel."""
        tensor = self.live(recorded)
        if tensor.dim() == 2:
            tensor = tensor[:, :, None, None]
        if tensor.dim() != 4 or tensor.dtype not in conv_steps.TYPES or not conv_steps.is_channels_last(tensor):
            raise NotNative
        if 0 in tensor.shape:
            raise NotNative
        return tensor

    def input(self, recorded: torch.Tensor, made: list[Description]) -> torch.Tensor:
        """``image``, by way of a copy that ``made`` begins with where the order is another."""
        tensor = self.live(recorded)
        if tensor.dim() != 4 or tensor.dtype != torch.float32 or conv_steps.is_channels_last(tensor):
            return self.image(recorded)
        copy = torch.empty_like(tensor, memory_format=torch.channels_last)
        self.kept.append(copy)
        made.append(conv_steps.describe_convert(tensor, copy))
        return copy

    def rows(self, recorded: torch.Tensor) -> torch.Tensor:
        """Where ``recorded`` float32 [..., K] is, as [M, K] with contiguous rows."""
        tensor = self.live(recorded)
        if tensor.dtype != torch.float32 or not tensor.numel() or not tensor.dim():
            raise NotNative
        try:
            rows = tensor.view(-1, tensor.shape[-1])
        except RuntimeError:  # not without a copy
            raise NotNative from None
        if rows.stride(1) != 1 and rows.shape[1] > 1:
            raise NotNative
        return rows

    def constant(self, recorded: torch.Tensor) -> torch.Tensor:
        """``recorded`` itself, where it is neither an input nor made by a call."""
        if self.live(recorded) is not recorded:
            raise NotNative
        return recorded

    def own(self, values: torch.Tensor | None) -> int | None:
        """The address of a float32 copy of a vector, which lives as long as the steps."""
        if values is None:
            return None
        self.kept.append(values.detach().to(torch.float32, copy=True).contiguous())
        return int(self.kept[-1].data_ptr())

    def is_read_later(self, recorded: torch.Tensor) -> bool:
        """Whether a group of calls after this one reads the memory of ``recorded``, or the result is in it."""
        return self._last_use.get(recorded.untyped_storage().data_ptr(), self.group) > self.group

    def reserve(self, size: int, born: int | None = None) -> Scratch:
        """``size`` bytes from this group (or ``born``) on, until the last that uses them."""
        self.scratch.append(Scratch(size, self.group if born is None else born, [], [self.group]))
        return self.scratch[-1]

    def set_maker(self, made: torch.Tensor, rows: torch.Tensor, job: Any) -> None:
        """``job`` writes ``rows``, the place of ``made``, and can quantise them."""
        self.makers[made.untyped_storage().data_ptr()] = Maker(self.group, rows, job)

    def is_nonnegative(self, recorded: torch.Tensor) -> bool:
        """Whether an int8 tensor is known to hold 0 to 127."""
        return recorded.untyped_storage().data_ptr() in self._nonnegative

    def set_nonnegative(self, recorded: torch.Tensor) -> None:
        """Say so."""
        self._nonnegative.add(recorded.untyped_storage().data_ptr())

    def forget(self, written: list[torch.Tensor]) -> None:
        """Another operator wrote these: what was known of them is not so any more."""
        storages = {tensor.untyped_storage().data_ptr() for tensor in written}
        self._nonnegative -= storages
        self.quantized = {key: value for key, value in self.quantized.items() if key[0] not in storages}
        self.makers = {key: value for key, value in self.makers.items() if key not in storages}
