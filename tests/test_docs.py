"""The pages under docs/ say what is so: their snippets run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.backend import tilewright

ROOT = Path(__file__).resolve().parents[1]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler, and there is none"
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_snippets_about_compiling_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    if "tilewright" not in torch._dynamo.list_backends():  # not installed anew since it has an entry point
        torch._dynamo.register_backend(compiler_fn=tilewright, name="tilewright")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "torch_compile.md").read_text(encoding="utf-8")
    snippets = SNIPPET.findall(page)
    assert len(snippets) >= 8
    space: dict[str, Any] = {"__name__": "snippets"}
    for snippet in snippets:
        exec(snippet, space)
    assert {each.name for each in tmp_path.iterdir()} >= {"model.export.pt2", "model.pt2", "model.onnx"}
