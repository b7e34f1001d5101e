"""A lock between processes that the operating system lets go of when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _grab(descriptor: int) -> bool:
    """Try to lock an open file; False if another holds it."""
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ImportError:  # Windows
        msvcrt: Any = importlib.import_module("msvcrt")
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path, patience: float = 20.0) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs. Closing the file lets go, and so does the end of the process.

    The file itself stays: removing it would let two processes lock two files of one name. Raises TimeoutError when
    another holds the lock for ``patience`` seconds, OSError where the file cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        start = time.monotonic()
        while not _grab(descriptor):
            if time.monotonic() - start > patience:
                raise TimeoutError(f"{path} has been locked for {patience:g} seconds")
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)
