"""The command ``tilewright``, also ``python -m tilewright``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tilewright.commands import cache, doctor, tune


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status: for ``doctor`` 1 if something could be better, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="tilewright", description="Fast int8 and int4 layers for PyTorch models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in (("doctor", doctor), ("tune", tune), ("cache", cache)):
        summary, _, rest = (module.__doc__ or "").partition("\n")
        module.add_arguments(
            commands.add_parser(
                name,
                help=summary.partition(": ")[2].rstrip("."),
                description=f"{summary}\n{rest}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    options = parser.parse_args(arguments)
    if os.getcwd() not in sys.path:
        # "module:function" is looked for here too, as with python -m, and after everything that is installed.
        sys.path.append(os.getcwd())
    run = {"doctor": doctor.run, "tune": tune.run, "cache": cache.run}[options.command]
    try:
        return run(options)
    except (ValueError, OSError) as error:
        print(f"tilewright {options.command}: {error}", file=sys.stderr)  # noqa: T201  (a command speaks to its user)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
