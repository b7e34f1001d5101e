"""The demo of convolutional networks measures what it says it measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("sklearn", reason="the extra `hf` is not installed")
demo = pytest.importorskip("examples.digits_demo", reason="the demo needs tilewright and its dependencies")


def figures(**int8: Any) -> list[Any]:
    fine = demo.Figures("net", "fp32", 98.0, 1000, {1: 2.0})
    return [fine, replace(fine, name="fused"), replace(fine, name="int8", **{"model_bytes": 300, **int8})]


@pytest.mark.parametrize("change", [{"accuracy": 97.4}, {"model_bytes": 400}], ids=["accuracy", "size"])
def test_each_goal_can_be_missed(change: dict[str, Any]) -> None:
    assert all(goal.met for goal in demo.goals(figures(), True))
    assert sum(not goal.met for goal in demo.goals(figures(**change), True)) == 1
    assert sum(not goal.met for goal in demo.goals(figures(), False)) == 1
    fp32, fused, int8 = figures()
    assert sum(not goal.met for goal in demo.goals([fp32, replace(fused, accuracy=98.1), int8], True)) == 1


def test_accuracy_is_the_share_of_right_answers() -> None:
    x, y = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert demo.accuracy(nn.Identity(), x, y) == 75


def test_test_images_are_not_trained_on() -> None:
    x, y = demo.digits()
    assert x.shape == (1797, 1, 8, 8) and x.min() >= 0 and x.max() == 1 and len(y) == 1797
    assert demo.CALIBRATED_ON <= demo.TRAINED_ON < len(x)
    assert all(torch.equal(a, b) for a, b in zip(demo.digits(), (x, y), strict=True))


def test_warm_up_runs_are_not_counted() -> None:
    calls: list[str] = []
    variants = {name: nn.Identity() for name in "ab"}
    for name, model in variants.items():
        model.register_forward_hook(lambda *_, name=name: calls.append(name))
    assert all(latency > 0 for latency in demo.time_variants(variants, torch.ones(1)).values())
    block = demo.WARM_UP_RUNS + demo.RUNS_IN_A_ROW
    assert calls == (["a"] * block + ["b"] * block) * demo.ROUNDS, "they take turns"


@pytest.mark.parametrize("arguments, status", [([], 0), (["--check"], 1)], ids=["figures alone", "check"])
def test_goals_are_shown_and_decide_only_where_they_are_asked_for(
    arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "NETWORKS", {"net": nn.Identity})
    monkeypatch.setattr(demo, "measure", lambda name, build: (figures(), demo.goals(figures(model_bytes=900), True)))
    assert demo.main(arguments) == status
    shown = capsys.readouterr().out
    assert "Digits" in shown and ("MISSED" in shown) == ("met:" in shown) == bool(status)


@pytest.mark.slow
def test_the_demo_runs_and_keeps_its_promises(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "examples" / "digits_demo.py"), "--check", "--json", str(written)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [figure["name"] for figure in json.loads(written.read_text())["figures"]] == ["fp32", "fused", "int8"] * 2
