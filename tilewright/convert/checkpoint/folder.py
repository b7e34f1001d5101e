"""The folder of a checkpoint, in which one process may save while others load: they see the older or the newer one.

A data file never changes once it has its name, which tells what is in it, and the manifest is exchanged in one step, as
the last. A reader opens all files before it reads: what it has open stays, even when the next save removes the names.
Where a file is gone before it was opened, the manifest is another by then, and the reader begins again with that.

Saves into one folder wait for each other: each holds a lock on the folder, which goes with its process. So what looks
like part of a save that is under way is left of one that was killed, and the next one removes it. On filesystems
without such locks nobody waits, and such files are left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from tilewright.convert.checkpoint.manifest import FILE_NAME, Manifest, parse_manifest, read_manifest
from tilewright.convert.checkpoint.safetensors_file import CheckpointError, Entry, open_regular, read_header
from tilewright.convert.text import listed

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger("tilewright")
_TEMPORARY = re.compile(r"\.tilewright-[0-9a-f]{16}-\d+\.tmp")
_DATA_FILE = re.compile(r"model-[0-9a-f]{12}-\d{5,}-of-\d{5,}\.safetensors")
#: A data file that is open, its tensors, and where their bytes begin.
Shard = tuple[BinaryIO, dict[str, Entry], int]


# ---- saving
class Save:
    """What one save does with the names in a folder. exclusive: whether it is known to be the only one."""

    def __init__(self, folder: Path, exclusive: bool):
        self.folder, self.exclusive = folder, exclusive
        self._stem = f".tilewright-{secrets.token_hex(8)}"
        self._older = _data_files_of(folder)
        self._temporary: list[Path] = []
        self._published = False

    def temporary(self) -> Path:
        """A path for the next file, under which no reader looks."""
        self._temporary.append(self.folder / f"{self._stem}-{len(self._temporary)}.tmp")
        return self._temporary[-1]

    def publish(self, data_files: Iterable[str]) -> None:
        """Give the files their names: ``data_files`` in the order of their making, the last made is the manifest. Then
        remove what the older checkpoint had, and what saves left that were killed.
        """
        names = list(data_files)
        for source, name in zip(self._temporary, [*names, FILE_NAME], strict=True):
            if name == FILE_NAME:
                _flush(self.folder)  # no manifest before its data files, whenever the power fails
            os.replace(source, self.folder / name)
        self._published = True
        _flush(self.folder)
        left = self._older | (_named(self.folder, _DATA_FILE) if self.exclusive else set())
        _remove(self.folder, left - set(names))

    def close(self) -> None:
        """Remove what has no name yet, and what no manifest names."""
        _remove(self.folder, [path.name for path in self._temporary])
        if self.exclusive and not self._published:
            _remove(self.folder, _named(self.folder, _DATA_FILE) - self._older)


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[Save]:
    """One save into ``folder``, which is made if need be. Waits for another that is under way."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as exclusive:
        if exclusive:
            _remove(folder, _named(folder, _TEMPORARY))
        save = Save(folder, exclusive)
        try:
            yield save
        finally:
            save.close()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock on ``folder``. False where it has none."""
    if sys.platform == "win32":
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        held = _lock(descriptor, folder)
        try:
            yield held
        finally:
            if held:  # a process that was forked meanwhile may keep the descriptor
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> bool:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: waiting for another save to end", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _data_files_of(folder: Path) -> set[str]:
    """Data files of a save that is in the folder already."""
    if not (folder / FILE_NAME).exists():
        return set()
    try:
        return set(read_manifest(folder).shards())
    except CheckpointError:
        return set()  # Not ours, or broken: its manifest is replaced, its other files are left.


def _named(folder: Path, pattern: re.Pattern[str]) -> set[str]:
    return {name for name in os.listdir(folder) if pattern.fullmatch(name)}


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def _flush(folder: Path) -> None:
    """Have the names in ``folder`` on the disk, where directories can be flushed."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- loading
@contextlib.contextmanager
def opened(folder: Path) -> Iterator[tuple[Manifest, dict[str, Shard]]]:
    """The manifest and all data files of one checkpoint, open. Raises CheckpointError if they are not a whole one."""
    path = folder / FILE_NAME
    while True:
        with ExitStack() as stack:
            file = stack.enter_context(open_regular(path))
            manifest = parse_manifest(file, path)
            try:
                shards = {
                    shard: _open_shard(stack, folder / shard, names, manifest)
                    for shard, names in manifest.shards().items()
                }
            except CheckpointError:
                if _is_replaced(file, path):
                    continue
                raise
            yield manifest, shards
            return


def _is_replaced(file: BinaryIO, path: Path) -> bool:
    """Whether another file has the name ``path`` now. (As long as ``file`` is open, no other gets its number.)"""
    try:
        return not os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _open_shard(stack: ExitStack, path: Path, names: list[str], manifest: Manifest) -> Shard:
    """An open data file whose header says the same as the manifest."""
    file = stack.enter_context(open_regular(path))
    entries, start = read_header(file, path)
    if missing := [name for name in names if name not in entries]:
        raise CheckpointError(f"{path}: lacks the tensors {listed(missing)} that the manifest places there")
    if unexpected := sorted(set(entries) - set(names)):
        raise CheckpointError(
            f"{path}: holds the tensors {listed(unexpected)}, which the manifest does not place there"
        )
    for name in names:
        if reason := manifest.tensors[name].why_not(entries[name]):
            raise CheckpointError(f"{path}: tensor {name!r} {reason}")
    return file, entries, start
