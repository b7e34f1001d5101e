"""What the emulator raises."""

from __future__ import annotations


class PTXError(RuntimeError):
    """A defect found while a kernel runs; the message names kernel, source line, instruction, CTA and thread.

    ``lane`` is the index into the active threads of the access, where one thread is to blame.
    """

    def __init__(self, message: str, lane: int | None = None) -> None:
        super().__init__(message)
        self.lane = lane


class OutOfBounds(PTXError):
    """An access outside every tensor, or across the end of one."""


class Misaligned(PTXError):
    """An address that is not a multiple of the access size."""


class UninitializedRead(PTXError):
    """Shared memory read before it was written."""


class AsyncHazard(PTXError):
    """Shared memory or a register touched while an asynchronous operation on it is still in flight."""


class RaceError(PTXError):
    """Two warps touch the same shared byte between two barriers, or two CTAs the same global byte, and one writes."""


class Unsupported(NotImplementedError):
    """An instruction, or a form of one, that the emulator does not know. It never guesses."""


class PTXSyntaxError(ValueError):
    """The text is outside the grammar that the parser knows."""
