"""The tuner over real kernels, in Triton's interpreter: every step but the time is what a GPU would see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright import autotune
from tilewright.autotune import racing
from tilewright.kernels import tuning
from tilewright.kernels.dispatch.card import make_arguments
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.int4_linear import triton_fused
from tilewright.kernels.int8_linear import triton_tile
from tilewright.kernels.int8_linear.triton_operators import operators


@pytest.fixture(autouse=True)
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle_machine: None):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(racing, "ROUNDS", ((1, 10.0), (1, 1.0)))
    autotune.forget_tables()
    yield
    autotune.forget_tables()


CASES = [
    (triton_fused, Problem("int4_linear", 3, 40, 256, torch.float16, group_size=64, symmetric=False, bias=True)),
    (triton_tile, Problem("int8_linear_quantized", 20, 40, 256, torch.int8, bias=True, residual=True)),
]


@pytest.mark.parametrize("module, asked", CASES, ids=["int4 fused", "int8 tile"])
def test_the_tuner_runs_checks_and_remembers(module: Any, asked: Problem):
    tuned = module.TUNED
    few = tuned.split_candidates(tuning.representative(asked))[0][:3]
    assert len(few) == 3
    arguments = make_arguments(asked)
    before = getattr(module, asked.op)(**arguments)
    outcome = autotune.tune(tuned, asked, budget=20, candidates=few)
    assert not outcome.failed and set(outcome.seconds) == set(few)
    assert tuned.choose(asked) == outcome.config
    after = getattr(module, asked.op)(**arguments)
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)


def test_a_kernel_that_is_wrong_for_one_configuration_is_found(monkeypatch: pytest.MonkeyPatch):
    module, asked = CASES[1]
    tuned = module.TUNED
    few = tuned.split_candidates(tuning.representative(asked))[0][:3]
    plan = module.plan_tile

    def broken(*args: Any, **end: Any) -> Any:
        launches = plan(*args, **end)
        if tuned._forced.get() == few[1]:
            launches[0].args["K"] = 128  # half of the sum
        return launches

    monkeypatch.setattr(module, asked.op, operators(broken)[1])
    outcome = autotune.tune(tuned, asked, budget=20, candidates=few)
    assert list(outcome.failed) == [few[1]] and "wrong result" in outcome.failed[few[1]]
    assert outcome.config in (few[0], few[2])
