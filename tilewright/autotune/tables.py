"""What has been tuned, as this process knows it: tables shipped with the package, under the user's own.

Files are read when a device is first asked about, and again when they have changed since. Without a file that can be
written, what is tuned is kept for this process.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tilewright.autotune import folders
from tilewright.autotune.device import DeviceKind, triton_version
from tilewright.autotune.modes import changed
from tilewright.autotune.store import (
    FORMAT,
    Entry,
    add_entries,
    read_device,
    read_or_set_aside,
    read_table,
    remove_table,
    write_table,
)

logger = logging.getLogger("tilewright")
#: In place of the driver's version in shipped tables: measured with one, taken to hold for all.
ANY_DRIVER = "any"

#: How the name of a file with what a CPU does at most ends, beside that of the table of what was timed on it.
MEASURED = ".peaks.json"


def key_of(name: str, facts: Mapping[str, object], driver: str, source: str) -> str:
    """The key of one entry: everything that a measurement depends on, beside the device that names the file."""
    parts = [name, *(f"{what}={value}" for what, value in facts.items())]
    return " | ".join([*parts, f"triton={triton_version()}", f"driver={driver}", f"source={source}"])


@dataclass
class _Known:
    """The tables of one kind of device. stamp: which version of the user's file was read."""

    path: Path
    shipped: dict[str, Entry]
    user: dict[str, Entry] = field(default_factory=dict)
    here: dict[str, Entry] = field(default_factory=dict)
    stamp: tuple[int, ...] | None = None


_known: dict[tuple[Path, DeviceKind], _Known] = {}
_lock = threading.RLock()
_warned: set[Path] = set()


def table_path(device: DeviceKind, folder: Path | None = None) -> Path:
    """The file for a kind of device: the one that ``TILEWRIGHT_CPU_TABLE`` names for CPUs, else one in ``folder``, by
    default the user's. The format is in the name: another version neither reads nor replaces it.
    """
    named = folders.cpu_table() if device.is_cpu and folder is None else None
    if named is not None:
        return named
    return (folder or folders.user_folder()) / f"{device.slug}.v{FORMAT}.json"


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _tables_of(device: DeviceKind) -> _Known:
    path = table_path(device)
    known = _known.get((path, device))
    if known is None:
        known = _Known(path, read_or_set_aside(table_path(device, folders.SHIPPED)))
        _known[(path, device)] = known
    stamp = _stamp(path)
    if stamp != known.stamp:
        known.user = read_or_set_aside(path) if stamp else {}
        known.stamp = _stamp(path)
    return known


def is_empty(device: DeviceKind) -> bool:
    """Whether nothing is known of such a device: then no key need be made."""
    if device.is_cpu and folders.cpu_tables_off():
        return True
    with _lock:
        known = _tables_of(device)
        return not (known.shipped or known.user or known.here)


def lookup(device: DeviceKind, name: str, facts: Mapping[str, object], source: str) -> tuple[Entry, str] | None:
    """The entry for a problem and where it comes from: "user" or "shipped"; None if it was never tuned, and on a CPU
    whose tables are turned off.
    """
    if device.is_cpu and folders.cpu_tables_off():
        return None
    with _lock:
        known = _tables_of(device)
        own = key_of(name, facts, device.driver, source)
        for entries in (known.here, known.user):
            if own in entries:
                return entries[own], "user"
        shipped = known.shipped.get(key_of(name, facts, ANY_DRIVER, source))
        return None if shipped is None else (shipped, "shipped")


def remember(device: DeviceKind, entries: Mapping[str, Entry]) -> None:
    """Add entries to the user's table; for this process alone, with one warning, where it cannot be written. Nothing on
    a CPU whose tables are turned off.
    """
    if device.is_cpu and folders.cpu_tables_off():
        return
    with _lock:
        known = _tables_of(device)
        known.here.update(entries)
        try:
            known.user = add_entries(known.path, device, entries)
            known.stamp = _stamp(known.path)
        except OSError as error:  # TimeoutError is one
            if known.path not in _warned:
                _warned.add(known.path)
                warnings.warn(
                    f"tilewright: tuned configurations are kept for this process only, {known.path} cannot be written "
                    f"({error}); {folders.VARIABLE} names another folder",
                    RuntimeWarning,
                    stacklevel=2,
                )
    changed()


def forget_tables() -> None:
    """Read every file anew when it is next asked for, and drop what was kept for this process only."""
    with _lock:
        _known.clear()
    changed()


def user_tables() -> list[Path]:
    """The user's tables, of every device."""
    folder, named = folders.user_folder(), folders.cpu_table()
    found = sorted(folder.glob(f"*.v{FORMAT}.json")) if folder.is_dir() else []
    return [*found, *([named] if named is not None and named.is_file() and named not in found else [])]


def entries_of(device: DeviceKind) -> dict[str, Entry]:
    """All that was tuned on such a device, shipped or the user's, by key."""
    if device.is_cpu and folders.cpu_tables_off():
        return {}
    with _lock:
        known = _tables_of(device)
        return {**known.shipped, **known.user, **known.here}


def user_measurements() -> list[Path]:
    """The files beside the user's tables with what CPUs do at most (``kernels.cpu.peaks``)."""
    folder, named = folders.user_folder(), folders.cpu_table()
    found = set(folder.glob(f"*.v{FORMAT}{MEASURED}")) if folder.is_dir() else set()
    beside = None if named is None else named.with_suffix(MEASURED)
    return sorted(found | ({beside} if beside is not None and beside.is_file() else set()))


def clear_tables() -> tuple[int, int, int]:
    """Delete the user's tables and what was measured beside them; returns (tables, their entries, measurements). Raises
    OSError for one that cannot be deleted.
    """
    paths, measured = user_tables(), user_measurements()
    count = sum(remove_table(path) for path in paths)
    for path in measured:
        remove_table(path)
    forget_tables()
    return len(paths), count, len(measured)


def export_table(source: Path, target: Path, shipped: bool = False) -> int:
    """Copy a table to ``target``, which must not exist; returns the number of entries. Raises TableError, OSError.

    shipped: in the form of the tables that come with the package, whose entries hold for every driver.
    """
    entries = read_table(source)
    if shipped:
        entries = {_for_any_driver(key): entry for key, entry in entries.items()}
    if target.exists():
        raise FileExistsError(f"{target} exists")
    write_table(target, read_device(source), entries)
    return len(entries)


def _for_any_driver(key: str) -> str:
    return " | ".join(f"driver={ANY_DRIVER}" if part.startswith("driver=") else part for part in key.split(" | "))


def import_table(source: Path) -> tuple[Path, int]:
    """Add the entries of a table to the user's own for the same device; returns (that table, number of entries).

    Raises TableError if ``source`` is no table, OSError if it cannot be read or the user's cannot be written.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    entries, device = read_table(source), read_device(source)
    path = table_path(device)
    if any(f"driver={ANY_DRIVER}" in key.split(" | ") for key in entries):
        entries = {key.replace(f"driver={ANY_DRIVER}", f"driver={device.driver}"): v for key, v in entries.items()}
    add_entries(path, device, entries)
    forget_tables()
    return path, len(entries)
