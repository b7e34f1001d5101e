"""Every test compiles anew and sees only its own reports."""

from __future__ import annotations

import pytest
import torch

from tilewright.backend import forget_reports


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    forget_reports()
