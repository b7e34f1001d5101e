"""Where tables lie: those shipped with the package, and the user's own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

#: Moves the user's tables elsewhere.
VARIABLE = "TILEWRIGHT_CACHE_DIR"
#: "off", or the file of what was timed on this CPU.
CPU_VARIABLE = "TILEWRIGHT_CPU_TABLE"
SHIPPED = Path(__file__).parent / "tables"


def user_folder() -> Path:
    """The folder of the user's tables, which need not exist: ``TILEWRIGHT_CACHE_DIR``, else the platform's cache."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "tilewright"
    except RuntimeError:  # there is no home at all
        return Path(base.replace("~", os.curdir, 1)) / "tilewright"


def cpu_tables_off() -> bool:
    """Whether no table is to decide on a CPU: ``TILEWRIGHT_CPU_TABLE=off``."""
    return os.environ.get(CPU_VARIABLE, "").lower() == "off"


def cpu_table() -> Path | None:
    """The file that ``TILEWRIGHT_CPU_TABLE`` names for what is timed on CPUs; None where it names none."""
    given = os.environ.get(CPU_VARIABLE, "")
    return Path(given).expanduser() if given and not cpu_tables_off() else None
