"""The benchmarks that need no GPU.

    python -m bench [NAME ...]     by default: operators

operators: every layer and operator on a small problem, a minute. linear, conv: speed-ups of layers and of convolutional
networks, minutes. peers: linear layers beside every peer that is installed. onnx: layers and encoders beside ONNX
Runtime, and the goals. Floors are ``python -m bench.roofline``.

Each has more options of its own: ``python -m bench.cpu_linear --help``, ``bench.cpu_conv``, ``bench.run``,
``bench.cpu``.
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
    "peers": ["bench.run", "--device", "cpu"],
    "onnx": ["bench.cpu"],
}


def main(arguments: list[str] | None = None) -> int:
    """Run the named benchmarks; returns the first exit status that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="see above")
    names = parser.parse_args(arguments).names or ["operators"]
    unknown = [name for name in names if name not in COMMANDS]
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; known: {', '.join(COMMANDS)}")
    statuses = [subprocess.run([sys.executable, "-m", *COMMANDS[name]], check=False).returncode for name in names]
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
