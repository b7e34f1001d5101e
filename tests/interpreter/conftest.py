"""Rung 3: the kernels in Triton's interpreter, in a process of their own.

Triton decides once, when a kernel is decorated, whether it is interpreted. So these tests cannot share a process with
tests that compile, and `make test` gives them one with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from pathlib import Path

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return None if INTERPRETING else True


def pytest_report_header() -> str | None:
    return None if INTERPRETING else "tests/interpreter left out: TRITON_INTERPRET is not 1 (make test runs it so)"
