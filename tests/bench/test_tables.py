"""Every table is a module that says what it makes and takes options; none times by itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from bench.__main__ import commands, main, title

BENCH = Path(__file__).resolve().parents[2] / "bench"
#: The timer, what it rests on, and what can import nothing of this revision.
OWN_CLOCK = {"timer.py", "idle.py", "same_worker.py", "conversion_worker.py"}
TABLES = [name for name in commands() if name != "operators"]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_a_title_and_a_command_line(name: str):
    module = ast.parse((BENCH / "tables" / f"{name}.py").read_text(encoding="utf-8"))
    assert title(name).endswith((".", ":"))
    assert f"python -m bench.tables.{name}" in (ast.get_docstring(module) or "")
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body)


def test_an_unknown_name_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["abacus"])
    assert "no benchmark is called 'abacus'; known: operators, " in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(BENCH.rglob("*.py")), ids=lambda path: path.name)
def test_there_is_one_timer(path: Path):
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time"
    }
    assert path.name in OWN_CLOCK or used <= {"monotonic", "sleep"}, "time that is left, not time that is measured"
