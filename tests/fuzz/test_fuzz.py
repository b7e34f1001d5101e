"""Random small networks, converted in every way, answer as the networks that they were made from.

``python -m tests.fuzz --minutes 30`` searches on. What it finds goes to ``found``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import nn

from tests.fuzz.found import FOUND, program
from tests.fuzz.judge import FORMATS, Judge, Wrong
from tests.fuzz.known import FAILING, WITHOUT
from tests.fuzz.programs import SETTINGS, Program, programs

drawn = given(programs(WITHOUT), st.sampled_from(sorted(FORMATS)), st.sampled_from([False, False, False, True]))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The networks are tiny: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def judge(program: Program, kind: str, save: bool) -> None:
    Judge(program, FORMATS[kind], save)()


@settings(SETTINGS, max_examples=40, derandomize=True)
@drawn
def test_random_networks(program: Program, kind: str, save: bool) -> None:
    judge(program, kind, save)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(20))
def test_many_random_networks(turn: int) -> None:
    seed(turn)(settings(SETTINGS, max_examples=100)(drawn(judge)))()


@pytest.mark.parametrize(
    "hazard, name",
    [
        pytest.param(
            hazard,
            name,
            marks=[pytest.mark.xfail(reason=known_cause, raises=Wrong)]
            if (known_cause := FAILING.get((hazard, name)))
            else [],
        )
        for hazard, programs in FOUND.items()
        for name in programs
    ],
)
def test_what_was_found(hazard: str, name: str) -> None:
    for kind in FORMATS.values():
        Judge(FOUND[hazard][name], kind)()


BLOCK = program(
    "self.m0 = nn.Conv2d(4, 8, 3, padding=1)\nself.m1 = nn.BatchNorm2d(8)\nself.m2 = nn.Linear(8, 16)",
    """
    v0 = F.relu(self.m1(self.m0(x)))
    return self.m2(v0.permute(0, 2, 3, 1))
    """,
)
MISTAKES = {
    "activation": ("F.relu", ""),
    "batch-norm": ("self.m1(self.m0(x))", "self.m0(x)"),
    "order": ("F.relu(self.m1(self.m0(x)))", "self.m1(F.relu(self.m0(x)))"),
    "shift": ("(0, 2, 3, 1)", "(0, 3, 2, 1)"),
    "input": ("        v0 =", "        x.mul_(1.01)\n        v0 ="),
    "channel": ("v0.permute", "torch.cat([v0[:, :7], 0 * v0[:, 7:]], 1).permute"),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_more_than_a_format_may_err(mistake: str, kind: str) -> None:
    class Mistaken(Judge):
        def convert(self, model: nn.Module, data: list[torch.Tensor]) -> nn.Module:
            return Program(BLOCK.source.replace(*MISTAKES[mistake]), BLOCK.shape).make()

    with pytest.raises(Wrong, match="off by"):
        Mistaken(BLOCK, FORMATS[kind], save=False)()
