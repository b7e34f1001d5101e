"""The benchmarks that need no GPU, one after another.

    python -m bench [NAME ...]     operators, linear, conv; all of them by default

The table beside every peer, which takes longer, is ``python -m bench.run``; floors are ``python -m bench.roofline``.

Each has more options of its own: ``python -m bench.cpu_linear --help``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

#: Each in a process of its own: what one leaves in the allocator and in idle threads slows the next.
COMMANDS = {
    "operators": ["pytest", str(Path(__file__).parent), "-q"],
    "linear": ["bench.cpu_linear"],
    "conv": ["bench.cpu_conv"],
}


def main(arguments: list[str] | None = None) -> int:
    """Run the named benchmarks; returns the first exit status that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="see above")
    names = parser.parse_args(arguments).names or list(COMMANDS)
    unknown = [name for name in names if name not in COMMANDS]
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; known: {', '.join(COMMANDS)}")
    statuses = [subprocess.run([sys.executable, "-m", *COMMANDS[name]], check=False).returncode for name in names]
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
