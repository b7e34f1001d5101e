"""The table of `make perf`."""

from __future__ import annotations

import pytest

from bench import timer
from bench.tables import never_slower


def times(names: list[str], ratio: float) -> timer.Timings:
    return timer.Timings({name: timer.Timing((1e-3 / (ratio if name else 1),)) for name in names})


@pytest.mark.parametrize(
    "ratios, status, measured",
    [((1.2,), 0, 1), ((0.5, 0.98), 0, 2), ((0.5, 0.6, 0.7), 1, 3)],
    ids=["faster", "the second time", "slower each time"],
)
def test_what_seems_slower_is_measured_again(
    ratios: tuple[float, ...],
    status: int,
    measured: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    left = list(ratios)
    monkeypatch.setattr(never_slower, "interleaved", lambda calls, **options: times(list(calls), left.pop(0)))
    assert never_slower.main(["--shapes", "64x32", "--rows", "2", "--formats", "int8"]) == status
    assert len(ratios) - len(left) == measured
    out = capsys.readouterr().out
    assert f"{status} of 1 below 0.97x" in out
    assert ("- int8, 64 x 32, 2 rows: 0.70x by" in out) == bool(status)


def test_thirty_shapes_and_five_batches():
    assert len(set(never_slower.SHAPES)) == 30 and len(never_slower.ROWS) == 5
    assert set(never_slower.ERRORS) == set(never_slower.FORMATS)


def test_a_wrong_result_is_no_gain(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(never_slower.ERRORS, "int8", 1e-9)
    with pytest.raises(ValueError, match="int8 64 x 32 at 2 rows has a relative error"):
        never_slower.main(["--shapes", "64x32", "--rows", "2", "--formats", "int8"])


def test_the_fastest_quarter():
    assert timer.Timing((1.0, 8.0, 2.0, 9.0, 7.0, 9.0, 9.0, 9.0)).fastest == 1.5
    assert timer.Timing((3.0,)).fastest == 3.0
