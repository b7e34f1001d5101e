"""Short lists made without a GPU: what is dropped and why, and that the tuner takes what is left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from tilewright import autotune
from tilewright.aot.targets import find_target
from tilewright.autotune.offline import filling
from tilewright.autotune.store import TableError
from tilewright.kernels import tuning
from tilewright.kernels.dispatch.problem import Problem

pytestmark = pytest.mark.aot
H200 = {"device": "cuda", "capability": (9, 0), "multiprocessors": 132, "device_name": "NVIDIA H200"}


@pytest.fixture(scope="module")
def pruned() -> autotune.ShortListed:
    asked = Problem("int4_linear", 16, 4096, 4096, torch.bfloat16, group_size=128, **H200)
    tuned, found = next(iter(tuning.kernels_for(asked)))
    few = [c for c in tuned.candidates(found) if c.splits == 1 and c.num_stages in (2, 4) and c.block_m == 16]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tuned), "all_candidates", lambda self, p: [self.heuristic(p), *few])
        yield autotune.prune(tuned, found, "sm_90")


def test_the_figures_of_what_is_kept(pruned: autotune.ShortListed):
    assert len(pruned.kept) >= 4 and pruned.tunable.heuristic(pruned.problem) in pruned.kept
    for config, figures in pruned.kept.items():
        assert 16 < figures.registers <= 255 and figures.spill_bytes == 0
        assert 0 < figures.shared_bytes <= 227 * 1024 and "wgmma" in figures.matrix, config


def test_filling_by_hand():
    # 132 units, one block each with 26 KB on the way: full. Half the blocks: half full. Twice and one: a wave for one.
    assert filling(132, 4, 32, 26_000, 132, 228 * 1024) == 1.0
    assert filling(66, 4, 32, 26_000, 132, 228 * 1024) == 0.5
    assert filling(132, 4, 32, 13_000, 132, 228 * 1024) == 0.5
    one_resident = filling(133, 8, 255, 100_000, 132, 101_376)
    assert abs(one_resident - 133 / 264) < 1e-9
    assert filling(0, 4, 0, 0, 0, 1024) == 0.0


def test_the_order_is_most_promising_first(pruned: autotune.ShortListed):
    values = [figures.filling for figures in pruned.kept.values()]
    assert values == sorted(values, reverse=True) and 0 < values[0] <= 1


def test_what_spills_or_does_not_fit_is_dropped_with_the_figure():
    asked = Problem("int8_linear_quantized", 4096, 4096, 4096, torch.int8, **H200)
    tuned, found = list(tuning.kernels_for(asked))[-1]
    sizes = {(c.block_m, c.block_n, c.num_warps): c for c in tuned.candidates(found) if c.block_k == 128}
    few = [sizes[128, 128, 8], sizes[256, 128, 8]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tuned), "all_candidates", lambda self, p: few)
        on_small = autotune.prune(tuned, found, "sm_89")
    assert set(on_small.kept) | set(on_small.dropped) == set(few) and on_small.dropped
    assert all("shared memory" in why or "spill" in why for why in on_small.dropped.values()), on_small.dropped


def test_a_short_list_is_read_back_for_the_same_problem_alone(pruned: autotune.ShortListed, tmp_path: Path):
    path = tmp_path / "short.json"
    made = autotune.ShortList("sm_90")
    made.add(pruned)
    made.write(path)
    short = autotune.ShortList.read(path)
    assert short.target == "sm_90" and short.triton == made.triton and short.lists == made.lists
    assert short.candidates(pruned.tunable, pruned.problem) == list(pruned.kept)
    assert short.candidates(pruned.tunable, pruned.problem.with_rows(64)) is None
    assert short.outdated() == []
    text = json.loads(path.read_text())
    text["lists"] = {key.replace("source=", "source=x"): value for key, value in text["lists"].items()}
    path.write_text(json.dumps(text))
    old = autotune.ShortList.read(path)
    assert old.candidates(pruned.tunable, pruned.problem) is None and old.outdated() == list(old.lists)
    old.add(pruned)  # replaces what is of other code
    assert old.lists == made.lists


def test_equal_code_is_compiled_once(pruned: autotune.ShortListed, monkeypatch: pytest.MonkeyPatch):
    from tilewright.aot import compiler as aot

    made, compile_launch = [], aot.compile_launch
    monkeypatch.setattr(aot, "compile_launch", lambda *one: made.append(one) or compile_launch(*one))
    few = list(pruned.kept)[:2]
    monkeypatch.setattr(type(pruned.tunable), "all_candidates", lambda self, p: few)
    compiler = autotune.Compiler(find_target("sm_90"))
    for n in (4096, 8192):
        wide = replace(pruned.problem, n=n)
        found = autotune.prune(pruned.tunable, wide, "sm_90", compiler=compiler)
        assert set(found.kept) == set(few)
    assert len(made) == len({str(one[0].constants) for one in made}) <= 2 * len(few)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 9}',
        '{"format": 2, "target": "x", "triton": "3", "lists": 3}',
        '{"format": 2, "target": "x", "triton": "3", "lists": {"k": {"fields": ["a"], "kept": [[[1, 2]]]}}}',
        "[" * 9999,
    ],
)
def test_what_is_no_short_list_is_refused(tmp_path: Path, text: str):
    (tmp_path / "short.json").write_text(text)
    with pytest.raises(TableError):
        autotune.ShortList.read(tmp_path / "short.json")


def test_implementations_have_nothing_to_compile():
    asked = Problem("int4_linear", 16, 4096, 4096, torch.bfloat16, group_size=128)
    with pytest.raises(ValueError, match="nothing to compile"):
        autotune.prune(tuning.implementation_of("int4_linear"), asked, "sm_90")
