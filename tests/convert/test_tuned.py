"""Timing implementations while a model is converted: when it is done, for what, and what the report says."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright import autotune
from tilewright.autotune import tables
from tilewright.autotune.clock import CpuClock
from tilewright.convert import tuned
from tilewright.convert.recipes import PRESETS
from tilewright.convert.record import Record
from tilewright.kernels import layer_trials, tuning
from tilewright.kernels.cpu import native
from tilewright.kernels.dispatch.packed import packed_bytes
from tilewright.kernels.dispatch.router import Implementation, implementations, register, route, unregister

pytestmark = pytest.mark.skipif(native.why_no_native() is not None, reason=f"no C kernels: {native.why_no_native()}")
X = torch.randn(9, 64)


@pytest.fixture(autouse=True)
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle_machine: None) -> Iterator[None]:
    """As users have it: conversions time what they may."""
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TILEWRIGHT_AUTOTUNE")
    autotune.forget_tables()
    yield
    autotune.forget_tables()


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.Linear(64, 96)).eval()


def buckets() -> set[str]:
    """What is remembered: "operator, rows, output x input features"."""
    device = tuning.device_kind(tw.nn.Int8Linear(8, 8).problem(1))
    found = set()
    for key in tables.entries_of(device):
        name, *parts = key.split(" | ")
        facts = dict(part.split("=", 1) for part in parts)
        found.add(f"{name.split('.')[0]}, {facts['m']}, {facts['n']} x {facts['k']}")
    return found


def test_sample_inputs_say_what_is_timed():
    small = tw.convert_model(model(), "int8", calibration_data=[X])
    assert buckets() == {"int8_linear, <=16, 96 x 64", "int8_linear, <=16, 64 x 96"}
    assert small[0].activation == "relu"
    layer = tw.report(small).converted[0]
    assert layer.origins == {1: "order of preference", 256: "order of preference"}
    assert "layer sizes: 2 timed here on 2" in tw.report(small).timing
    decision = route(small[2].problem(9))
    assert decision.origin.startswith("timed here on 2")


def test_example_inputs_do_as_well_and_what_is_known_is_not_timed_again(monkeypatch: pytest.MonkeyPatch):
    tw.convert_model(model(), "int4-g32", example_inputs=[X])
    assert len(buckets()) == 2
    monkeypatch.setattr(layer_trials, "trials", lambda *args: pytest.fail("nothing is to be tried"))
    assert "2 were timed before" in tw.report(tw.convert_model(model(), "int4-g32", example_inputs=[X])).timing


def test_without_inputs_it_is_done_when_asked_for():
    tw.convert_model(model(), "int8")
    assert not buckets()
    small = tw.convert_model(model(), "int8", tune=True)
    assert {bucket.split(", ")[1] for bucket in buckets()} == {f"<={rows}" for rows in tuned.ROWS}
    report = tw.report(small)
    assert report.converted[0].origins[1].startswith("timed here on 2")
    assert any(line.startswith("implementations at M=1") and "timed here" in line for line in report.headlines())
    assert report.to_json()["layers"][0]["origins"][1].startswith("timed here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", PRESETS)
def test_every_recipe_can_be_timed(recipe: str, dtype: torch.dtype):
    plain = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 64), nn.Linear(64, 96))
    plain, x = plain.eval().to(dtype), torch.randn(5, 4, 8, 8, dtype=dtype)
    small = tw.convert_model(plain, recipe, calibration_data=[x], tune=True)
    assert not tw.report(small).timing or "here on" in tw.report(small).timing
    assert ("int8_linear, <=8, 64 x 288" in buckets()) == (recipe in ("int8", "w8a8"))
    with torch.inference_mode():
        assert small(x).isfinite().all()


@pytest.mark.parametrize("variable", ["TILEWRIGHT_CPU_TABLE=off", "TILEWRIGHT_AUTOTUNE=0", ""])
def test_it_can_be_turned_off(variable: str, monkeypatch: pytest.MonkeyPatch):
    if variable:
        monkeypatch.setenv(*variable.split("="))
    small = tw.convert_model(model(), "int8", calibration_data=[X], tune=None if variable else False)
    assert not buckets() and tw.report(small).timing == ""
    with pytest.raises(TypeError, match="tune is True or False"):
        tw.convert_model(model(), "int8", tune=1)


def test_a_busy_machine_is_named_and_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CpuClock, "watch", lambda self: lambda: "other processes used 59% of the cores")
    small = tw.convert_model(model(), "int8", calibration_data=[X])
    words = "implementations were not timed, the machine is busy (other processes used 59% of the cores)"
    assert tw.report(small).timing.startswith(words) and words in " ".join(str(tw.report(small)).split())
    assert not buckets()


class Fixed:
    """A clock on which the C kernel takes ``first`` seconds and all others ``other``."""

    def __init__(self, first: float, other: float, ran: list[str]):
        self.first, self.other, self.ran = first, other, ran

    def prepare(self, run):
        return run

    def watch(self):
        return lambda: None

    def seconds(self, prepared, count: int) -> list[float]:
        prepared()
        return [self.first if self.ran[-1] == tuning.C_KERNEL else self.other] * count


@pytest.mark.parametrize(
    "first, other, served",
    [(1e-3, 0.95e-3, "C kernel"), (1e-3, 0.85e-3, "twin"), (20e-6, 14e-6, "C kernel")],
    ids=["too little to leave a program for", "clearly faster", "less than a call through the dispatcher takes"],
)
def test_who_replaces_the_c_kernel(first: float, other: float, served: str, monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []
    make = layer_trials.layer_call

    def noting(implementation: Implementation, arguments):
        call = make(implementation, arguments)
        return lambda: (ran.append(implementation.name), call())[1]

    monkeypatch.setattr(layer_trials, "layer_call", noting)
    monkeypatch.setattr(layer_trials, "clock_for", lambda device, copies: Fixed(first, other, ran))
    reference = next(one for one in implementations("int8_linear") if one.name == "reference")
    register(Implementation("twin", "int8_linear", lambda problem: None, reference.target), before="reference")
    try:
        small = tw.convert_model(model(), "int8", calibration_data=[X])
        chosen = route(small[2].problem(9))
        assert (chosen.name == "C kernel") == (served == "C kernel"), chosen
        if served != "C kernel":
            assert "as fast as C kernel" in dict(chosen.declined)["C kernel"]
    finally:
        unregister("int8_linear", "twin")


def test_a_wrong_implementation_cannot_win():
    def nothing(**arguments: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*arguments["x"].shape[:-1], len(arguments["weight"]))

    globals()["nothing"] = nothing
    register(Implementation("zeros", "int8_linear", lambda problem: None, f"{__name__}:nothing"), before="reference")
    try:
        small = tw.convert_model(model(), "int8", calibration_data=[X])
        assert route(small[2].problem(9)).name != "zeros"
    finally:
        unregister("int8_linear", "zeros")
        del globals()["nothing"]


def test_results_are_as_without_and_nothing_stays_packed():
    torch.manual_seed(0)
    plain = model()
    gc.collect()  # models of other tests that lie in cycles
    before = packed_bytes()
    small = tw.convert_model(plain, "int8", calibration_data=[X])
    assert packed_bytes() == before
    other = tw.convert_model(plain, "int8", calibration_data=[X], tune=False)
    with torch.inference_mode():
        torch.testing.assert_close(small(X), other(X), rtol=1e-4, atol=1e-4)


def test_checkpoints_keep_the_words(tmp_path: Path):
    small = tw.convert_model(model(), "int8", calibration_data=[X])
    tw.save_model(small, tmp_path / "small")
    assert tw.report(tw.load_model(tmp_path / "small", model)).timing == tw.report(small).timing
    assert Record.from_json({"recipes": [], "layers": {}, "skipped": {}}).timing == ""
