"""What int8 and int4 layers gain over float32."""

from __future__ import annotations

import pytest

from bench import timer
from bench.tables import speed


@pytest.mark.parametrize("slow, status", [(1, 1), (10, 0)], ids=["missed", "met"])
def test_goals_decide_only_where_they_are_asked_for(
    slow: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    found = timer.Timings({"float32": timer.Timing((1e-3 * slow,)), "ours": timer.Timing((1e-3,))})
    monkeypatch.setattr(speed, "interleaved", lambda calls, **options: found)
    monkeypatch.setattr(speed, "GOALS", {"an isa": {"int8": {1: 5.0}}})
    monkeypatch.setattr(speed, "isa_in_use", lambda: "an isa")
    assert speed.main(["--size", "64", "--rows", "1"]) == 0
    assert "below" not in capsys.readouterr().out
    assert speed.main(["--size", "64", "--rows", "1", "--check"]) == status
    assert ("1.00x (below 5.0x)" in capsys.readouterr().out) == bool(status)
