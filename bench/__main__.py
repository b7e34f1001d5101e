"""The tables and reports of ``bench/tables``, and the microbenchmarks of every operator.

    python -m bench [NAME ...]     by default: operators, a minute

operators: every layer and operator on a small problem. Any other name is a module of ``bench/tables``: each says with
``python -m bench.tables.NAME --help`` what it makes, and takes options of its own that way.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def commands() -> dict[str, list[str]]:
    """By name, what Python is to run. Each in a process of its own: what one leaves in the allocator, and its threads,
    slow the next.
    """
    tables = sorted(path.stem for path in (HERE / "tables").glob("*.py") if path.stem != "__init__")
    return {"operators": ["pytest", str(HERE), "-q"], **{name: [f"bench.tables.{name}"] for name in tables}}


def title(name: str) -> str:
    """The first sentence of a table's module."""
    source = (HERE / "tables" / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0].replace("\n", " ")


def main(arguments: list[str] | None = None) -> int:
    """Run the named benchmarks; returns the first exit status that is not 0."""
    known = commands()
    listed = "\n".join(f"  {name:<18} {title(name)}" for name in known if name != "operators")
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=listed, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="see above and below")
    names = parser.parse_args(arguments).names or ["operators"]
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; known: {', '.join(known)}")
    statuses = [subprocess.run([sys.executable, "-m", *known[name]], check=False).returncode for name in names]
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
