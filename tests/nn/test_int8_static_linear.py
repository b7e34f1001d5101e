"""The linear layer with a static activation scale: what is particular to it, from calibration to a file and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright.nn import Int8StaticLinear


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 48)).eval()


@pytest.fixture
def data() -> list[torch.Tensor]:
    return [torch.randn(64, 96) for _ in range(3)]


def test_the_definition(data: list[torch.Tensor]) -> None:
    linear, x = nn.Linear(96, 64), data[0].view(4, 16, 96)
    layer = Int8StaticLinear.from_float(linear, input_scale=0.02)
    q = (x / 0.02).round().clamp(-127, 127)
    expected = q @ layer.weight_codes.float().t() * 0.02 * layer.weight_scale + linear.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    images = x.view(4, 4, 4, 96)
    assert torch.equal(layer(images), layer(x).view(4, 4, 4, 64))


def test_scales_come_from_calibration_data_and_survive_a_file(data: list[torch.Tensor], tmp_path: Path) -> None:
    model = network()
    converted = tw.convert_model(model, "int8-static", calibration_data=data)
    assert [type(layer).__name__ for layer in converted][::2] == ["Int8StaticLinear"] * 3
    assert converted[0].x_scale == pytest.approx(max(float(x.abs().max()) for x in data) / 127, rel=0.35)
    with torch.no_grad():
        expected = converted(data[0])
        assert (expected - model(data[0])).norm() < 0.05 * model(data[0]).norm()
        tw.save_model(converted, tmp_path / "model")
        again = tw.load_model(tmp_path / "model", network)
        assert torch.equal(again(data[0]), expected)
        assert again[0].x_scale == converted[0].x_scale
        reverted = tw.revert_model(converted)
        assert all(type(layer) is nn.Linear for layer in list(reverted)[::2])
    assert "w8a8-static" in str(tw.report(again))


def test_without_data_there_is_no_scale() -> None:
    with pytest.raises(ValueError, match="needs calibration_data"):
        tw.convert_model(network(), tw.Int8StaticInputs())
    with pytest.raises(ValueError, match="positive and finite"):
        Int8StaticLinear.from_float(nn.Linear(4, 4), input_scale=0.0)


def test_minmax_takes_the_largest_value_seen(data: list[torch.Tensor]) -> None:
    model = tw.convert_model(network(), {"0": tw.Int8StaticInputs(observer="minmax")}, calibration_data=data)
    assert model[0].x_scale == pytest.approx(max(float(x.abs().max()) for x in data) / 127, rel=1e-6)
