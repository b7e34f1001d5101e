"""Tensors that end where readable memory ends, so that the interpreter cannot read past them unnoticed."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
from collections.abc import Callable

import torch

PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of ``tensor`` whose last byte is the last before a page that must not be touched."""
    size = tensor.numel() * tensor.element_size()
    readable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, readable + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(start + readable), mmap.PAGESIZE, PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=readable - size)
    return flat.view(tensor.shape).copy_(tensor)


def survives(run: Callable[[], None]) -> bool:
    """Whether ``run`` ends in a forked process, rather than being killed by touching a guard page."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # to be killed may be what the test expects
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the forked process raised an exception; its traceback is in the captured output")
    return not os.WIFSIGNALED(status)
