"""``keep_if_faster``: layers are timed on the user's inputs, and what loses is given back with both times."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright.convert import timing
from tilewright.nn import ConvLayer, QuantizedLinear


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 8)).eval()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Time is decided by the test: a factor for each number of output features."""
    factors: dict[int, float] = {}
    seen: list[torch.Size] = []

    def compare_calls(old, new, device):
        y = new()
        seen.append(y.shape)
        torch.testing.assert_close(y, old(), rtol=0.5, atol=0.5)
        return 1e-3, 1e-3 * factors.get(y.shape[-1], 0.5)

    monkeypatch.setattr(timing, "compare_calls", compare_calls)
    return factors, seen


def test_what_loses_is_given_back_with_both_times(clock):
    factors, seen = clock
    factors[8] = 1.25
    model = network()
    converted = tw.convert_model(model, "int8", heads=True, example_inputs=torch.randn(5, 64), keep_if_faster=True)
    assert isinstance(converted[0], QuantizedLinear) and isinstance(converted[2], QuantizedLinear)
    assert type(converted[4]) is nn.Linear
    assert seen == [(5, 96), (5, 96), (5, 8)]
    report = tw.report(converted)
    (left,) = report.skipped
    assert left.name == "4"
    assert left.reason == "not faster converted: 1000 us as it was, 1250 us converted, with 5 rows"
    assert [(one.microseconds_before, one.microseconds_after) for one in report.converted] == [(1e3, 500.0)] * 2
    header = next(line for line in str(report).splitlines() if "scheme" in line)
    assert "us before" in header and "us after" in header
    assert type(model[0]) is nn.Linear


def test_both_times_without_giving_anything_back(clock):
    factors, _ = clock
    factors[96] = 3.0
    converted = tw.convert_model(network(), "int8", example_inputs=torch.randn(5, 64))
    assert [one.microseconds_after for one in tw.report(converted).converted] == [3e3, 3e3, 500.0]


def test_where_nothing_is_faster_the_model_comes_back_as_it_was(clock):
    factors, _ = clock
    factors.update({96: 1.0, 8: 2.0})
    model, x = network(), torch.randn(5, 64)
    converted = tw.convert_model(model, "int8", example_inputs=x, keep_if_faster=True)
    assert not any(isinstance(module, QuantizedLinear) for module in converted.modules())
    torch.testing.assert_close(converted(x), model(x))
    assert {one.name for one in tw.report(converted).skipped if one.reason.startswith("not faster")} == {"0", "2", "4"}


def test_in_place(clock):
    factors, _ = clock
    factors[8] = 2.0
    model = network()
    last = model[4]
    converted = tw.convert_model(model, "int8", example_inputs=torch.randn(5, 64), keep_if_faster=True, inplace=True)
    assert converted is model and model[4] is last and isinstance(model[0], QuantizedLinear)


def test_times_survive_saving(clock, tmp_path):
    converted = tw.convert_model(network(), "int8", example_inputs=torch.randn(5, 64))
    tw.save_model(converted, tmp_path)
    loaded = tw.load_model(tmp_path, network)
    assert [one.microseconds_before for one in tw.report(loaded).converted] == [1e3] * 3
    assert copy.deepcopy(converted)[0].in_features == 64


def test_inputs_in_every_form_and_every_shape_once(clock):
    _, seen = clock
    inputs = [torch.randn(5, 64), (torch.randn(1, 64),), torch.randn(5, 64)]
    tw.convert_model(network(), {"0": "int8"}, example_inputs=inputs, keep_if_faster=True)
    assert seen == [(5, 96), (1, 96)]


def test_a_layer_that_is_not_reached_is_converted_untimed(clock):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.used(x)

    converted = tw.convert_model(Half(), "int8", example_inputs=torch.randn(2, 64), keep_if_faster=True)
    spare = {one.name: one for one in tw.report(converted).converted}["spare"]
    assert spare.microseconds_after is None


def test_it_needs_inputs():
    with pytest.raises(ValueError, match="keep_if_faster needs example_inputs"):
        tw.convert_model(network(), "int8", keep_if_faster=True)


@pytest.mark.parametrize("factor, kept", [(0.5, True), (1.5, False)])
def test_convolutions_are_kept_or_given_back_together(monkeypatch, factor: float, kept: bool):
    monkeypatch.setattr(timing, "compare_calls", lambda old, new, device: (old(), new()) and (1e-3, factor * 1e-3))
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 8)).eval()
    images = torch.randn(2, 3, 8, 8)
    converted = tw.convert_model(model, {"4": None, "*": "fuse"}, example_inputs=images, keep_if_faster=True)
    assert sum(isinstance(module, ConvLayer) for module in converted.modules()) == (2 if kept else 0)
    torch.testing.assert_close(converted(images), model(images))
    reasons = [one.reason for one in tw.report(converted).skipped]
    words = "not faster converted: the whole model takes 1000 us as it was, 1500 us converted, on the example inputs"
    assert reasons.count(words) == (0 if kept else 2)


def test_real_times_of_a_layer_that_loses_and_one_that_wins():
    slow, fast = nn.Linear(64, 64), nn.Linear(64, 64)
    slow.register_forward_hook(lambda *_: [torch.randn(300, 300) @ torch.randn(300, 300) for _ in range(4)] and None)
    reached = [timing.Reached(torch.randn(3, 64), 2)]
    assert timing.compare(slow, fast, reached).before > timing.compare(slow, fast, reached).after
    assert timing.compare(fast, slow, reached).slower
    assert timing.compare(fast, slow, []) is None
