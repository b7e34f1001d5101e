"""Every test of autotune has tables of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tilewright.autotune import forget_tables


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    home = tmp_path / "tables"
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(home))
    monkeypatch.delenv("TILEWRIGHT_AUTOTUNE", raising=False)
    forget_tables()
    yield home
    forget_tables()
