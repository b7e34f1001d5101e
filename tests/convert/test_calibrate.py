from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tilewright.convert import calibrate, convert_model, report
from tilewright.convert.calibrate import Memory, RowSample, relative_error, search_smoothing
from tilewright.convert.calibrate.smoothing import EXPONENTS, WORTHWHILE, smoothing_scale
from tilewright.convert.schemes import Int8ActInt4Weight, Int8Dynamic
from tilewright.nn import Int8Linear


def outlier_inputs(rows: int = 256, k: int = 64) -> torch.Tensor:
    """Activations as transformers have them: a few channels are far larger than all others."""
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(1))
    x[:, [3, 17]] *= 60
    return x


def test_a_sample_is_uniform_over_the_stream_and_bounded() -> None:
    sample = RowSample(limit=100, seed=0)
    for start in range(0, 10_000, 250):
        sample.add(torch.arange(start, start + 250).float().unsqueeze(-1))
    assert sample.rows is not None and sample.rows.shape == (100, 1)
    assert len(sample.rows.unique()) == 100
    # 100 draws from a uniform distribution on 0..10000: the mean is within four standard errors (289) of its centre.
    assert abs(sample.rows.mean().item() - 5000) < 4 * 289
    assert sample.largest is not None and sample.largest.item() == 9999  # of every row, not only of those kept


def test_what_is_held_of_rows_stays_within_the_memory_given() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))
    data = [torch.randn(300, 64) for _ in range(4)]
    of_a_row = 4 * (64 + 128 + 64) + 3 * 4
    for limit, rows in [(2**30, calibrate.MAX_ROWS), (200 * of_a_row + 5, 100), (1, 1)]:
        memory = Memory(limit)
        layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
        with calibrate.sampling(layers, memory.rows_of_each(layers, calibrate.MAX_ROWS), memory) as samples:
            assert calibrate.run(model, data) == 4
        held = sum(x.nbytes for each in samples.values() for x in (each.rows, each._keys))
        assert {len(each.rows) for each in samples.values()} == {rows}
        assert memory.held == memory.most == held == rows * of_a_row
        assert held <= limit or rows == 1


@torch.no_grad()
def test_a_conversion_holds_what_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    made: list[Memory] = []
    monkeypatch.setattr(calibrate, "Memory", lambda limit: made.append(Memory(limit)) or made[-1])
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 16))
    images = [torch.randn(2, 3, 10, 10) for _ in range(6)]
    image_bytes, row_bytes = images[0].nbytes, 4 * 8 * 36 + 4
    seen_bytes = image_bytes + 2 * 8 * (8 * 8 + 6 * 6) * 4  # what both convolutions read and return in a call
    tight = 2 * image_bytes + 3 * row_bytes
    for limit, kept, rows, seen in [(2**30, 4, 12, 4), (tight, 2, 3, 0), (1, 1, 1, 0)]:
        converted = convert_model(small, "int8", calibration_data=images, calibration_memory=limit)
        assert made[-1].most <= max(limit, image_bytes + row_bytes)
        assert made[-1].most <= kept * image_bytes + rows * row_bytes + seen * seen_bytes
        assert not seen or made[-1].most > kept * image_bytes + (seen - 1) * seen_bytes
        x = torch.randn(4, 3, 10, 10)
        assert relative_error(converted(x), small(x)) < 0.05


@pytest.mark.parametrize("wrong, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("1 GiB", TypeError)])
def test_memory_is_a_number_of_bytes(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="calibration_memory is a number of bytes"):
        convert_model(nn.Linear(64, 64), "int8", calibration_memory=wrong)


def test_rows_that_are_not_finite_are_left_out() -> None:
    sample = RowSample()
    sample.add(torch.tensor([[1.0, torch.nan], [2.0, 3.0], [torch.inf, 0.0]]))
    assert sample.rows is not None and sample.rows.tolist() == [[2.0, 3.0]]


def test_smoothing_scale_is_the_formula() -> None:
    x, w = torch.tensor([8.0, 2.0, 1.0]), torch.tensor([0.5, 1.0, 2.0])
    scale = smoothing_scale(x, w, 0.75)
    expected = w**0.25 / x**0.75
    torch.testing.assert_close(scale / scale[0], expected / expected[0])
    torch.testing.assert_close(scale.log().mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_smoothing_scale_survives_dead_channels() -> None:
    for x, w in [([0.0, 2.0], [1.0, 1.0]), ([1.0, 2.0], [0.0, 1.0]), ([0.0, 0.0], [0.0, 0.0])]:
        scale = smoothing_scale(torch.tensor(x), torch.tensor(w), 0.5)
        assert torch.isfinite(scale).all() and (scale > 0).all()


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])) == 0
    assert relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.8)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) is None
    assert relative_error(torch.tensor([torch.nan]), torch.ones(1)) is None


def test_the_search_helps_where_there_are_outliers_and_harms_nowhere() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    for x, helps in [(outlier_inputs(), True), (torch.randn(256, 64), False)]:
        sample = RowSample()
        sample.add(x)
        found = search_smoothing(linear, sample, Int8Linear.from_float)
        plain = calibrate.output_error(linear, Int8Linear.from_float(linear), sample)
        smoothed = calibrate.output_error(linear, Int8Linear.from_float(linear, **found.options), sample)
        assert plain is not None and smoothed is not None
        assert smoothed <= plain
        if helps:
            assert found.exponent is not None and smoothed < 0.5 * plain


def test_no_scale_is_chosen_if_none_is_best() -> None:
    linear = nn.Linear(8, 8)
    sample = RowSample()
    sample.add(torch.randn(16, 8))

    class Off(nn.Module):
        def __init__(self, linear: nn.Linear, by: float):
            super().__init__()
            self.linear, self.by = linear, by

        def dequantize_weight(self) -> torch.Tensor:
            return self.linear.weight + self.by

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.dequantize_weight(), self.linear.bias)

    def build(linear: nn.Linear, channel_scale: torch.Tensor | None = None) -> nn.Module:
        return Off(linear, 0.0 if channel_scale is None else 1.0)

    found = search_smoothing(linear, sample, build)
    assert found == calibrate.Found()


@pytest.mark.parametrize("width", [32, 512])
@pytest.mark.parametrize("scheme", [Int8Dynamic(), Int8ActInt4Weight(range_search="minmax")])
def test_the_search_on_samples_finds_what_one_on_everything_does(scheme: Any, width: int) -> None:
    torch.manual_seed(0)
    for size in (1.0, 8.0, 20.0, 60.0):
        linear, x = nn.Linear(128, width), torch.randn(500, 128)
        x[:, [3, 17, 60]] *= size
        with torch.no_grad():
            linear.weight *= torch.rand(width, 1) ** 4  # outputs of very different size, as in a trained model
        sample = RowSample()
        sample.add(x)
        scales = [smoothing_scale(sample.largest, linear.weight.abs().amax(0), each) for each in EXPONENTS]
        built = [scheme.build(linear), *(scheme.build(linear, channel_scale=each) for each in scales)]
        errors = [calibrate.output_error(linear, each, sample) for each in built]
        found = search_smoothing(linear, sample, scheme.build)
        chosen = errors[0 if found.exponent is None else 1 + EXPONENTS.index(found.exponent)]
        least = min(errors[1:]) if min(errors[1:]) < WORTHWHILE * errors[0] else errors[0]
        assert found.error == pytest.approx(chosen, rel=1e-4)
        assert chosen <= 1.1 * least, (size, errors, found.exponent)


@pytest.mark.parametrize("range_search", ["minmax", "mse"])
def test_scheme_search_never_loses_to_plain(range_search: str) -> None:
    torch.manual_seed(0)
    linear, scheme, sample = nn.Linear(64, 32), Int8Dynamic(range_search), RowSample()
    sample.add(outlier_inputs())
    found = scheme.search(linear, sample)
    errors = [calibrate.output_error(linear, scheme.build(linear, **o), sample) for o in ({}, found.options)]
    assert errors[1] < errors[0]


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 32)
        self.unused = nn.Linear(64, 32)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, y: torch.Tensor | float = 0.0) -> torch.Tensor:
        return self.dropout(self.fc(input=x)) + y


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict"])
def test_forms_of_calibration_data(form: str) -> None:
    x = outlier_inputs()
    item = {"tensor": x, "tuple": (x, 1.0), "list": [x], "dict": {"x": x, "y": 2.0}}[form]
    torch.manual_seed(0)
    model = Keywords().train()
    converted = convert_model(model, "int8", calibration_data=iter([item]))
    assert converted.fc.channel_scale is not None
    assert converted.unused.channel_scale is None
    by_name = {layer.name: layer for layer in report(converted).layers}
    assert by_name["fc"].output_error is not None and by_name["fc"].smoothing is not None
    assert by_name["unused"].output_error is None
    assert by_name["unused"].reason == "the calibration data did not reach it"


def test_calibration_leaves_the_model_as_it_was() -> None:
    model = Keywords().train()
    model.dropout.eval()
    convert_model(model, "int8", calibration_data=[outlier_inputs()])
    assert model.training and model.fc.training and not model.dropout.training
    assert not model.fc._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_calibration_that_fails_cleans_up() -> None:
    model = Keywords().train()
    with pytest.raises(RuntimeError):
        convert_model(model, "int8", calibration_data=[torch.randn(2, 5)], inplace=True)
    assert model.training and not model.fc._forward_pre_hooks
    assert type(model.fc) is nn.Linear
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ValueError, match="calibration_data is empty"):
        convert_model(model, "int8", calibration_data=[])


def test_calibration_reaches_the_layers_of_the_native_encoder() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    data = {"src": torch.randn(3, 7, 32), "src_key_padding_mask": torch.arange(7) >= torch.tensor([[7], [4], [2]])}
    converted = convert_model(model, "int8", calibration_data=[data])
    assert all(layer.output_error is not None for layer in report(converted).converted)


@pytest.mark.parametrize("inner", [nn.Identity(), nn.MultiheadAttention(8, 2)], ids=["plain", "native"])
def test_a_mode_watches_operators_only_where_pytorch_has_a_native_path(inner: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].inner = inner
    with calibrate.evaluation(model):
        assert bool(torch._C._len_torch_function_stack()) == isinstance(inner, nn.MultiheadAttention)
    assert not torch._C._len_torch_function_stack()


def test_data_that_no_scheme_uses_still_measures(caplog: pytest.LogCaptureFixture) -> None:
    converted = convert_model(nn.Sequential(nn.Linear(64, 32)), "int8-weight-only", calibration_data=[outlier_inputs()])
    assert "no scheme of this recipe makes use of calibration_data" in caplog.text
    assert report(converted).layers[0].output_error > 0


def test_importance_lowers_the_output_error_of_int4() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(64, 48)), [outlier_inputs()]
    weighed = report(convert_model(model, "int4-g32", calibration_data=data)).layers[0]
    plain = report(convert_model(model, "int4-g32"), example_inputs=data, original=model).layers[0]
    assert weighed.output_error < 0.9 * plain.output_error


def test_a_scale_that_gains_little_is_not_worth_its_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    converted = convert_model(model, "int8", calibration_data=[torch.randn(256, 64)])
    assert converted[0].channel_scale is None
