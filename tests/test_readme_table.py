"""The README's table says what was measured, and goes where its marks are."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

readme = pytest.importorskip("bench.tables.readme", reason="the demo's dependencies are not installed (extra: hf)")
ROOT = Path(__file__).resolve().parents[1]


def rows() -> list:
    return [
        readme.Row("fp32", 40_000_000, {32: [[0.1, 0.1], [0.2, 0.1]], 1: [[0.004]] * 2}, 1.0),
        readme.Row("int8", 10_000_000, {32: [[0.025, 0.025], [0.025, 0.025]], 1: [[0.002]] * 2}, 0.99912),
    ]


def test_speed_ups_are_of_medians_over_the_first_row() -> None:
    lines = readme.table(rows(), 37, 22).splitlines()
    assert lines[0].startswith("| all-MiniLM-L6-v2 | its 37 linear layers | batch 32 x 22 tokens")
    assert lines[2] == "| fp32 | 40.0 MB | 100.0 ms | 4.0 ms | 1.0000 |"
    assert lines[3] == "| int8 | 10.0 MB (0.25x) | 25.0 ms (**4.0x**) | 2.0 ms (**2.0x**) | 0.9991 |"
    assert readme.ranges(rows()) == "int8 at batch 32 4.0x to 6.0x, int8 at batch 1 2.0x to 2.0x"


def test_bars_are_as_long_as_what_they_say() -> None:
    drawn = ElementTree.fromstring(readme.chart(rows()))
    bars = [each for each in drawn if each.tag.endswith("rect") and each.get("rx") == "2"]
    widths = [float(bar.get("width")) for bar in bars]
    assert widths == [readme.WIDTH, readme.WIDTH / 4, readme.WIDTH, readme.WIDTH / 4]


def test_a_table_replaces_the_one_before(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- minilm: begin -->\nold\n<!-- minilm: end -->\nb\n")
    readme.put(page, "new\n")
    assert page.read_text() == "a\n<!-- minilm: begin -->\nnew\n<!-- minilm: end -->\nb\n"
    page.write_text("a\n")
    with pytest.raises(ValueError, match=r"page\.md has no marks"):
        readme.put(page, "new\n")


def test_both_pages_hold_the_same_table() -> None:
    tables = [readme.MARKS.search((ROOT / name).read_text())[0] for name in ("README.md", "docs/measured.md")]
    first, second = ([line for line in table.splitlines() if line.startswith("|")] for table in tables)
    if not first + second:
        pytest.skip("the table has not been made yet: python -m bench.tables.readme --write")
    assert first == second and len(first) == 6
    shown = [float(bar) for bar in re.findall(r">([\d.]+)</text>", (ROOT / "docs/images/minilm.svg").read_text())]
    assert [f"{value:.1f} ms" for value in shown[:4]] == [
        line.split("|")[3].split(" (")[0].strip() for line in first[2:]
    ]
