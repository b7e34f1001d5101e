"""``tilewright cache``: what has been tuned on this machine.

tilewright cache show                     where tables are, and what is in them
tilewright cache clear                    delete the user's tables and what ``doctor --measure`` kept
tilewright cache export FILE [--table T]  copy one to FILE; --shipped: in the form that comes with the package
tilewright cache import FILE              add what FILE holds to the user's tables
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from tilewright.autotune import folders, tables
from tilewright.autotune.store import Entry, TableError, read_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("show", help="where tables are, and what is in them")
    actions.add_parser("clear", help="delete the user's tables")
    export = actions.add_parser("export", help="copy a table")
    export.add_argument("file", type=Path)
    export.add_argument("--table", help="which one, where there are several: its file name")
    export.add_argument("--shipped", action="store_true", help="for every driver, as tables of the package are")
    actions.add_parser("import", help="add what a file holds").add_argument("file", type=Path)


def run(options: argparse.Namespace, console: Console | None = None) -> int:
    """Run the command; returns the exit status. What the user got wrong raises ValueError or OSError."""
    console = console or Console()
    if options.action == "show":
        return _show(console)
    if options.action == "clear":
        files, entries, measured = tables.clear_tables()
        more = f" and {measured} files of what this CPU does at most" if measured else ""
        console.print(f"deleted {files} tables with {entries} entries{more} in {folders.user_folder()}")
    elif options.action == "export":
        count = tables.export_table(_chosen(options.table), options.file, options.shipped)
        console.print(f"wrote {count} entries to {options.file}")
    else:
        path, count = tables.import_table(options.file)
        console.print(f"added {count} entries to {path}")
    return 0


def _chosen(name: str | None) -> Path:
    found = tables.user_tables()
    if name is not None:
        found = [path for path in found if path.name == name]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(f"there is no table{f' called {name}' if name else ''} in {folders.user_folder()}")
    raise ValueError(f"which table? --table takes one of {', '.join(path.name for path in found)}")


def _show(console: Console) -> int:
    console.print(f"the user's tables: {folders.user_folder()}", soft_wrap=True)
    shipped = sorted(folders.SHIPPED.glob("*.json"))
    console.print(f"with the package: {len(shipped)} tables")
    status = 0
    for path in [*shipped, *tables.user_tables()]:
        try:
            entries = read_table(path)
        except TableError as error:
            console.print(f"{path}: {error}", style="yellow", soft_wrap=True)
            status = 1
            continue
        console.print(f"\n{path.name}: {len(entries)} entries", style="bold", soft_wrap=True)
        for key, entry in entries.items():
            console.print(_describe(key, entry), soft_wrap=True, highlight=False, markup=False)
    return status


def _describe(key: str, entry: Entry) -> str:
    """One entry in a line. Versions and hashes tell entries apart, but nobody reads them."""
    name, *facts = key.split(" | ")
    about = [fact for fact in facts if not fact.startswith(("triton=", "driver=", "source=", "op="))]
    config = " ".join(f"{field}={value}" for field, value in entry["config"].items())
    times = ", ".join(
        f"{entry[field]} us{words}"
        for field, words in (("microseconds", ""), ("heuristic_microseconds", " by the heuristic"))
        if isinstance(entry.get(field), (int, float))
    )
    failed = entry.get("failed")
    notes = [f"{len(failed)} failed"] if isinstance(failed, list) and failed else []
    return f"  {name} {' '.join(about)}: " + ", ".join([config, times, *notes, str(entry.get("date", ""))[:10]])
