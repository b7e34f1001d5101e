"""The command ``tilewright``, also ``python -m tilewright``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tilewright import doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status: for ``doctor`` 1 if something could be better."""
    parser = argparse.ArgumentParser(prog="tilewright", description="Fast int8 and int4 layers for PyTorch models.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help=doctor.__doc__)
    parser.parse_args(arguments)
    findings = doctor.examine()
    doctor.print_findings(findings)
    return int(not all(finding.good for finding in findings))


if __name__ == "__main__":
    raise SystemExit(main())
