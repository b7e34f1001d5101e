"""The command ``tilewright``, also ``python -m tilewright``: every module of ``commands`` that has ``run``."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

from tilewright import commands


def _commands() -> dict[str, Any]:
    """By name: modules whose docstring begins ``tilewright name``: what it does."""
    names = [each.name for each in pkgutil.iter_modules(commands.__path__)]
    modules = {name: importlib.import_module(f"{commands.__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "run")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status: for ``doctor`` 1 if something could be better, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="tilewright", description="Fast int8 and int4 layers for PyTorch models.")
    subcommands = parser.add_subparsers(dest="command", required=True)
    for name, module in _commands().items():
        summary, _, rest = (module.__doc__ or "").partition("\n")
        subcommand = subcommands.add_parser(
            name,
            help=summary.partition(": ")[2].rstrip("."),
            description=f"{summary}\n{rest}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subcommand.set_defaults(run=module.run)
        module.add_arguments(subcommand)
    options = parser.parse_args(arguments)
    if os.getcwd() not in sys.path:
        # "module:function" is looked for here too, as with python -m, and after everything that is installed.
        sys.path.append(os.getcwd())
    try:
        status: int = options.run(options)
        return status
    except (ValueError, OSError) as error:
        print(f"tilewright {options.command}: {error}", file=sys.stderr)  # noqa: T201  (a command speaks to its user)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
