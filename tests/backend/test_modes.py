"""Converted models under ``torch.compile``: every mode, training of adapters, autocast, recompilation."""

from __future__ import annotations

import contextlib
import shutil
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

import tilewright as tw
from bench.tables import compile_modes
from tests.backend.networks import Feed
from tests.backend.test_options import needs_entry_point
from tilewright.backend import tilewright

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler, and there is none"
)
CELLS = [
    pytest.param(name, mode, marks=needs_entry_point if "tilewright" in mode else ())
    for name in compile_modes.MODELS
    for mode in compile_modes.MODES
]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name, mode", CELLS)
def test_the_table_in_the_docs_says_what_happens(name: str, mode: str) -> None:
    pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    result = compile_modes.cell(name, mode)
    lines = compile_modes.PAGE.read_text(encoding="utf-8").splitlines()
    header = next(line for line in lines if line.startswith("| model | `default`"))
    (row,) = [line for line in lines if line.startswith(f"| {name} |")]
    column = [cell.strip() for cell in header.split("|")].index(f"`{mode}`")
    assert row.split("|")[column].strip() == result


class Adapted(nn.Module):
    """A layer with a low-rank adapter beside it (LoRA, Hu et al. 2021, section 4.1)."""

    def __init__(self, base: nn.Module, features: int, rank: int = 4):
        super().__init__()
        self.base = base
        self.lora_down, self.lora_up = nn.Linear(features, rank, bias=False), nn.Linear(rank, features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_up(self.lora_down(x))


def compile_with(model: nn.Module, backend: str, **options: Any) -> Any:
    if backend == "tilewright":
        return torch.compile(model, fullgraph=True, backend=tilewright, options=options or None)
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize(
    "backend, inner",
    [
        ("aot_eager", None),
        ("tilewright", "aot_eager"),
        pytest.param("inductor", None, marks=[pytest.mark.slow, needs_compiler]),
        pytest.param("tilewright", "inductor", marks=[pytest.mark.slow, needs_compiler]),
    ],
)
def test_adapters_train_on_an_int4_base_that_stays(backend: str, inner: str | None) -> None:
    base = tw.convert_model(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), "int4-g32")
    model = Adapted(base, 64).train()
    base.requires_grad_(False)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    x = torch.randn(64, 64)
    with torch.no_grad():
        target = base(x) + 0.1 * x @ torch.randn(64, 4) @ torch.randn(4, 64)  # within reach of the adapter
    run = compile_with(model, backend, **({"inner": inner} if inner else {}))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (run(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("recipe", ["int8", "int4-g32", "int8-int4-g32"])
@pytest.mark.parametrize("mode", ["autocast", "inference_mode", "no_grad"])
def test_contexts_give_what_they_give_in_eager_mode(recipe: str, mode: str) -> None:
    model = tw.convert_model(Feed().eval(), recipe)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    contexts: dict[str, Any] = {
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "inference_mode": torch.inference_mode(),
        "no_grad": contextlib.nullcontext(),
    }
    with torch.no_grad(), contexts[mode]:
        found, expected = run(x), model(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "tilewright"])
def test_ten_batches_and_lengths_compile_twice(backend: str) -> None:
    model = tw.convert_model(Feed().eval(), "int8")
    frames = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal frames
        frames += 1
        if backend == "tilewright":
            return tilewright(graph, inputs, options={"inner": "aot_eager"})
        return lookup_backend(backend)(graph, inputs)

    run = torch.compile(model, fullgraph=True, backend=counting)
    with torch.no_grad():
        for batch in range(2, 7):
            for length in (3, 11):
                x = torch.randn(batch, length, 64)
                torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)
    assert frames <= 3
