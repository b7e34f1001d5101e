"""One table of tuned choices as a JSON file that survives its writers.

    {"format": 1, "device": {...}, "entries": {key: {"config": {...}, "microseconds": 12.3, ...}}}

Readers never lock: a file is replaced whole or not at all. Writers lock, read what others wrote meanwhile, add theirs
and replace. A process that is killed leaves the old file, and perhaps a temporary one that the next writer removes. A
file that is no table of ours is moved aside, never overwritten and never trusted: entries are checked here for their
form, and a config counts only if it is one of those the kernel knows (``tables.py``).
"""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tilewright.autotune.device import DeviceKind
from tilewright.autotune.lock import locked

logger = logging.getLogger("tilewright")
FORMAT = 1
#: A table with an entry for every layer of ten large models is below a megabyte.
MAX_BYTES = 16 * 2**20
MAX_ENTRIES = 20_000
#: What a configuration in a file may hold.
SCALARS = (str, int, float, bool, type(None))
Entry = dict[str, Any]


class TableError(ValueError):
    """A file that is not a table of tuned choices, with the reason."""


def _refuse_constant(name: str) -> Any:
    raise TableError(f"{name} is no JSON")


def parse_table(text: str) -> dict[str, Entry]:
    """The entries of a table. Raises TableError in words for anything that is not one."""
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except TableError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError also for an integer of thousands of digits
        raise TableError(f"it is no JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("entries"), dict):
        raise TableError("it is not an object with entries")
    if data.get("format") != FORMAT:
        raise TableError(f"its format is {str(data.get('format'))[:40]}, not {FORMAT}")
    if len(data["entries"]) > MAX_ENTRIES:
        raise TableError(f"it has {len(data['entries'])} entries, more than {MAX_ENTRIES}")
    for key, entry in data["entries"].items():
        config = entry.get("config") if isinstance(entry, dict) else None
        if not isinstance(config, dict) or not all(isinstance(value, SCALARS) for value in config.values()):
            raise TableError(f"the entry {key[:80]!r} has no config of plain values")
    return data["entries"]


def read_table(path: Path) -> dict[str, Entry]:
    """The entries of the table at ``path``, none where there is no file. Raises TableError, and OSError."""
    try:
        # What is not a regular file may never end: a pipe, a device.
        if not stat.S_ISREG(path.stat().st_mode):
            raise TableError("it is not a file")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return {}
    if len(raw) > MAX_BYTES:
        raise TableError(f"it is larger than {MAX_BYTES} bytes")
    try:
        return parse_table(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise TableError(f"it is no text: {error}") from error


def read_device(path: Path) -> DeviceKind:
    """The device that the table at ``path`` was measured on. Raises TableError if it does not say."""
    read_table(path)
    found = json.loads(path.read_text(encoding="utf-8")).get("device")
    kinds = {field.name: str(field.type) for field in fields(DeviceKind)}
    if not isinstance(found, dict) or {name: type(value).__name__ for name, value in found.items()} != kinds:
        raise TableError("it does not say which device it was measured on")
    return DeviceKind(**found)


def read_or_set_aside(path: Path) -> dict[str, Entry]:
    """As ``read_table``, but a bad file is renamed to ``*.bad`` with a warning, and an unreadable one ignored."""
    try:
        return read_table(path)
    except TableError as error:
        bad = path.with_name(path.name + ".bad")
        try:
            os.replace(path, bad)
            done = f"set aside as {bad.name}"
        except OSError:
            done = "ignored"
        warnings.warn(f"tilewright: the autotune table {path} was {done}: {error}", RuntimeWarning, stacklevel=2)
    except OSError as error:
        logger.info("the autotune table %s cannot be read: %s", path, error)
    return {}


def write_table(path: Path, device: DeviceKind, entries: Mapping[str, Entry]) -> None:
    """Replace the file at ``path`` at once. Raises OSError; the caller holds the lock."""
    data = {"format": FORMAT, "device": asdict(device), "entries": dict(sorted(entries.items()))}
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def add_entries(path: Path, device: DeviceKind, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Add ``entries`` to the table at ``path``, keeping what others wrote, and return all of them.

    Raises OSError where nothing can be written (a read-only home, a full disk), TimeoutError for a lock that stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(path.name + ".lock")):
        # Nobody else writes now: other temporary files are of processes that died.
        for orphan in path.parent.glob(f".{path.name}.*.tmp"):
            orphan.unlink(missing_ok=True)
        merged = {**read_or_set_aside(path), **entries}
        if len(merged) > MAX_ENTRIES:
            newest = sorted(merged, key=lambda key: str(merged[key].get("date", "")))[-MAX_ENTRIES:]
            merged = {key: merged[key] for key in newest}
        write_table(path, device, merged)
    return merged


def remove_table(path: Path) -> int:
    """Delete the table at ``path`` under its lock; returns how many entries it had."""
    with locked(path.with_name(path.name + ".lock")):
        count = len(read_or_set_aside(path))
        path.unlink(missing_ok=True)
    return count
