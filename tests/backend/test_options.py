"""The options of the backend, and how PyTorch finds it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tilewright.backend import tilewright
from tilewright.backend.options import Options

ROOT = Path(__file__).resolve().parents[2]
needs_entry_point = pytest.mark.skipif(
    "tilewright" not in {point.name for point in entry_points(group="torch_dynamo_backends")},
    reason="the installed metadata of tilewright is older than its entry point: install it again",
)


def test_an_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no option 'recip', did you mean 'recipe'\?; known: recipe, exclude, heads"):
        Options.of({"recip": "int4"})


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"recipe": "int5"}, ValueError, "int5"),
        ({"recipe": 4}, TypeError, "recipe"),
        ({"heads": 1}, TypeError, "heads"),
        ({"rewrites": ["norms"]}, ValueError, "norms"),
        ({"inner": 3}, TypeError, "inner"),
        ({"inductor": ["max_autotune"]}, TypeError, "inductor"),
        ({"inductor": {"max_autotun": True}}, ValueError, "max_autotun"),
        ({"inner": "eager", "inductor": {"max_autotune": True}}, ValueError, "inductor"),
        ({"inner": "tilewright"}, ValueError, "itself"),
        ({"exclude": "re:("}, ValueError, "regular expression"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_a_wrong_option_is_an_error_at_the_first_call(options: dict[str, Any], error: type, words: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(nn.Linear(8, 8), backend=tilewright, options=options)
    with pytest.raises(Exception, match=words) as raised:
        run(torch.randn(2, 8))
    assert error.__name__ in str(raised.value) or isinstance(raised.value, error)


def test_an_unknown_mode_is_an_error() -> None:
    torch._dynamo.reset()
    run = torch.compile(nn.Linear(8, 8), backend=tilewright, mode="fastest")
    with pytest.raises(Exception, match="fastest"):
        run(torch.randn(2, 8))


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@needs_entry_point
def test_a_fresh_process_finds_the_backend_by_name_without_importing_the_package() -> None:
    run_python(
        "import sys, torch\n"
        "assert 'tilewright' in torch._dynamo.list_backends()\n"
        "assert 'tilewright' not in sys.modules\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()\n"
        "run = torch.compile(model, backend='tilewright', options={'recipe': 'int4', 'inner': 'aot_eager'})\n"
        "x = torch.randn(2, 64)\n"
        "with torch.no_grad():\n"
        "    y, z = run(x), model(x)\n"
        "assert 0 < (y - z).norm() / z.norm() < 0.2\n"
    )


@pytest.mark.slow
def test_the_log_of_torch_shows_what_was_rewritten() -> None:
    code = (
        "import torch\n"
        "from tilewright.backend import tilewright\n"
        "options = {'recipe': 'int8', 'inner': 'eager'}\n"
        "run = torch.compile(torch.nn.Linear(64, 64), backend=tilewright, options=options)\n"
        "run(torch.randn(2, 64))\n"
    )
    assert "1 x linear" in run_python(code, TORCH_LOGS="tilewright")
