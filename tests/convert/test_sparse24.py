"""2:4 schemes in ``convert_model``: presets, calibration, report, checkpoints, the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright.convert.schemes import scheme_from_json
from tilewright.kernels.formats import sparse24
from tilewright.nn import QuantizedLinear, Sparse24Int4Linear, Sparse24Int8Linear, Sparse24Linear

PRESETS = {"sparse24": Sparse24Linear, "sparse24-int8": Sparse24Int8Linear, "sparse24-int4": Sparse24Int4Linear}
each_preset = pytest.mark.parametrize("preset", PRESETS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 48)).eval()


def batches() -> list[torch.Tensor]:
    """Inputs whose columns are correlated and of very different sizes."""
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(96, 96, generator=g) / 10 + torch.eye(96)
    return [torch.randn(64, 96, generator=g) @ mix * torch.logspace(-1, 1, 96) for _ in range(4)]


def error(model: nn.Module, original: nn.Module) -> float:
    with torch.no_grad():
        ours, theirs = (torch.cat([m(x) for x in batches()]) for m in (model, original))
    return float((ours - theirs).norm() / theirs.norm())


@each_preset
def test_presets_convert_report_and_revert(preset: str) -> None:
    model = network()
    converted = tw.convert_model(model, preset)
    assert all(type(converted[i]) is PRESETS[preset] for i in (0, 2, 4))
    report = tw.report(converted)
    assert report.totals["layer_ratio"] < {"sparse24": 0.3, "sparse24-int8": 0.19, "sparse24-int4": 0.13}[preset]
    for layer in report.converted:
        assert all(words.startswith(("unpacked once", "C kernel, 2:4")) for words in layer.implementations.values())
        assert 0.3 < layer.weight_error < 0.6
    reverted = tw.revert_model(converted)
    assert all(sparse24.why_not_24(reverted[i].weight) is None for i in (0, 2, 4))
    torch.testing.assert_close(reverted[0](batches()[0]).relu(), converted[0](batches()[0]), rtol=0.05, atol=0.3)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@each_preset
def test_the_report_says_where_2_4_does_not_pay_on_a_gpu(
    preset: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")
    gpu = {"device": "cuda", "capability": capability, "multiprocessors": 132}
    monkeypatch.setattr("tilewright.nn.quantized_linear.device_facts", lambda device: gpu)
    with torch.device("meta"):
        small, large = nn.Linear(384, 384), nn.Linear(4096, 4096)
    model = nn.Sequential(small, large).to_empty(device="cpu").bfloat16()
    for linear in (small, large):
        nn.init.normal_(linear.weight)
        nn.init.zeros_(linear.bias)
    report = tw.report(tw.convert_model(model, preset, heads=True))
    ours, theirs = report.converted
    assert all(words.startswith("unpacked once, then dense") for words in ours.implementations.values())
    assert theirs.implementations[256].startswith("unpacked once, then dense")
    reason = "kept dense: 2:4 does not pay for this shape"
    assert f"{reason} (384 x 384 weights are read as fast as a kernel is launched)" in report.to_markdown()
    if capability == (8, 0):
        assert f"{reason} (beyond 64 rows multiplying takes longer than reading the weight)" in report.to_markdown()
    else:
        batches = {"sparse24": "beyond 8 rows", "sparse24-int8": "beyond 16 rows", "sparse24-int4": "for every batch"}
        assert f"{reason} ({batches[preset]} dense was faster on an H200)" in report.to_markdown()
    if (preset, capability) == ("sparse24-int4", (9, 0)):
        assert theirs.implementations[1].startswith("unpacked once, then dense: Triton, mma.sync")
    else:
        assert theirs.implementations[1].startswith("Triton")
        assert not any(reason in words for words in theirs.declined[1])


def test_the_report_says_what_multiplies_on_a_cpu() -> None:
    reports = {preset: tw.report(tw.convert_model(network(), preset)).converted[0] for preset in PRESETS}
    assert reports["sparse24-int8"].implementations[1].startswith("unpacked once, then dense: ")
    assert reports["sparse24-int4"].implementations[1].startswith("unpacked once, then dense: ")
    float_report = reports["sparse24"]
    if float_report.implementations[1] != "C kernel, 2:4":
        assert "C kernel, 2:4" in str(float_report.declined[1])
        assert float_report.implementations[1] == "unpacked once, then dense"
        assert "up to 262144 products float32 is multiplied faster" in str(float_report.declined[1])


@each_preset
def test_calibration_prunes_by_sparsegpt_which_errs_less(preset: str) -> None:
    model = network()
    plain, calibrated = (tw.convert_model(model, preset, calibration_data=data) for data in (None, batches()))
    assert error(calibrated, model) < 0.8 * error(plain, model)
    assert all(layer.output_error is not None for layer in tw.report(calibrated).converted)


def test_prunings_stand_in_the_order_of_what_they_know() -> None:
    model = network()
    errors = {}
    for pruning in ("magnitude", "wanda", "sparsegpt"):
        converted = tw.convert_model(model, tw.Sparse24(pruning=pruning), calibration_data=batches())
        errors[pruning] = error(converted, model)
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_a_pruning_that_reads_inputs_needs_them() -> None:
    with pytest.raises(ValueError, match="sparse24-w16a16: pruning=wanda, the scheme of '0', needs calibration_data"):
        tw.convert_model(network(), tw.Sparse24(pruning="wanda"))


def test_a_layer_that_no_data_reaches_says_so() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    converted = tw.convert_model(Model(), "sparse24", calibration_data=[torch.randn(8, 64)])
    reasons = {layer.name: layer.reason for layer in tw.report(converted).converted}
    assert reasons == {"used": "", "unused": "the calibration data did not reach it: pruned by magnitude"}


def test_a_weight_that_is_2_4_already_stays_as_it_is() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight *= sparse24.best_mask(torch.rand_like(model[0].weight))
    converted = tw.convert_model(model, tw.Sparse24(compute_dtype=None), calibration_data=batches())
    assert torch.equal(converted[0].dequantize_weight(), model[0].weight)
    assert tw.report(converted).converted[0].reason == "its weight was 2:4 already"


@each_preset
def test_checkpoints(preset: str, tmp_path: Path) -> None:
    converted = tw.convert_model(network(), preset, calibration_data=batches())
    tw.save_model(converted, tmp_path)
    loaded = tw.load_model(tmp_path, network)
    assert torch.equal(loaded(batches()[0]), converted(batches()[0]))
    assert str(tw.report(loaded)) == str(tw.report(converted))


def test_a_checkpoint_with_places_that_do_not_ascend_is_refused(tmp_path: Path) -> None:
    converted = tw.convert_model(network(), "sparse24")
    converted[2].weight_meta[5, 3] = 0x5F
    tw.save_model(converted, tmp_path)
    with pytest.raises(tw.CheckpointError, match=r"'2.weight_meta' is no 2:4 pattern: row 5 keeps the places 3 and 3"):
        tw.load_model(tmp_path, network)
    with pytest.raises(RuntimeError, match="weight_meta is no 2:4 pattern: row 5"):
        tw.convert_model(network(), "sparse24").load_state_dict(converted.state_dict())


EXAMPLES = [
    tw.Sparse24(),
    tw.Sparse24(pruning="wanda", compute_dtype=None),
    tw.Sparse24Int8(pruning="magnitude", range_search="mse"),
    tw.Sparse24Int4(group_size=None, symmetric=False),
]


@pytest.mark.parametrize("scheme", EXAMPLES, ids=str)
def test_schemes_in_json(scheme: Any) -> None:
    assert scheme_from_json(json.loads(json.dumps(scheme.to_json()))) == scheme


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: tw.Sparse24(pruning="random"),
            "pruning must be one of auto, magnitude, wanda, sparsegpt, not 'random'",
        ),
        (lambda: tw.Sparse24(range_search="mse"), "Sparse24 quantises nothing"),
        (lambda: tw.Sparse24(compute_dtype="int8"), "compute_dtype must be"),
        (lambda: tw.Sparse24Int4(group_size=30), "groups of four: group_size must not be 30"),
    ],
)
def test_bad_options_are_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_preset
def test_layers_in_16_bits(preset: str, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    converted = tw.convert_model(model, preset)
    x = batches()[0].to(dtype)
    assert converted(x).dtype == dtype
    if preset == "sparse24":
        assert all(converted[i].weight_values.dtype == dtype for i in (0, 2, 4))


def test_a_mask_can_be_given_to_one_layer() -> None:
    linear = nn.Linear(16, 8)
    mask = sparse24.best_mask(torch.rand(8, 16))
    for kind in PRESETS.values():
        module: QuantizedLinear = kind.from_float(linear, mask=mask)  # type: ignore[attr-defined]
        assert torch.equal(module.mask(), mask)
        assert not module.dequantize_weight()[~mask].any()
        with pytest.raises(ValueError, match="the mask is not 2:4"):
            kind.from_float(linear, mask=torch.ones_like(mask))
    with pytest.raises(ValueError, match="must be finite"):
        Sparse24Linear.from_float(nn.Linear(4, 4).requires_grad_(False), weight=torch.full((4, 4), torch.nan),
                                  mask=mask[:4, :4])  # fmt: skip


# ---- convolutions
class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.wide, self.bn2 = nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.point, self.fc = nn.Conv2d(32, 24, 1), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(self.bn2(self.wide(x)))
        return self.fc(self.point(x).relu().mean((2, 3)))


def images_model() -> Images:
    torch.manual_seed(0)
    return Images().eval()


def test_pruned_convolutions_are_fused_as_they_are_and_others_left_alone(tmp_path: Path) -> None:
    model, x = images_model(), torch.randn(4, 3, 12, 12)
    pruned = tw.prune_model(model, exclude="stem")
    converted = tw.convert_model(pruned, {"fc": tw.Sparse24(compute_dtype=None), "*": "sparse24"})
    report = tw.report(converted)
    kinds = {layer.name: layer.kind for layer in report.converted}
    assert kinds == {"wide": "Sparse24ConvBnAct2d", "point": "Sparse24ConvBnAct2d", "fc": "Sparse24Linear"}
    assert {layer.name: layer.reason for layer in report.skipped} == {
        "stem": "2:4 takes four input channels of a group or more, not 3"
    }
    with torch.no_grad():
        torch.testing.assert_close(converted(x), pruned(x), rtol=1e-4, atol=1e-4)
    tw.save_model(converted, tmp_path)
    assert torch.equal(tw.load_model(tmp_path, images_model)(x), converted(x))
    reverted = tw.revert_model(converted)
    with torch.no_grad():
        torch.testing.assert_close(reverted(x), pruned(x), rtol=1e-4, atol=1e-4)


def test_convolutions_that_are_not_2_4_need_to_be_asked_for() -> None:
    model = images_model()
    skipped = {layer.name: layer.reason for layer in tw.report(tw.convert_model(model, "sparse24")).skipped}
    assert "its weight is not 2:4: prune_model makes it so" in skipped["wide"]
    converted = tw.convert_model(model, "sparse24-conv")
    assert type(converted.wide).__name__ == "Sparse24ConvBnAct2d"
    weight = converted.wide.dequantize_weight()
    assert sparse24.why_not_24(weight.flatten(0, -2)) is None
    with pytest.raises(ValueError, match="pruning must be 'given' or 'magnitude'"):
        tw.Sparse24Conv(pruning="wanda")


def test_the_operator_of_convolutions() -> None:
    op = torch.ops.tilewright.sparse24_conv2d_fused
    values, meta = sparse24.pack(torch.randn(6 * 9, 8) * sparse24.best_mask(torch.rand(6 * 9, 8)))
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    window = {"kernel_size": (3, 3), "padding": (1, 1, 1, 1)}
    torch.library.opcheck(op.default, (x, values, meta, bias), {**window, "activation": "silu"})
    weight = sparse24.unpack(values, meta, 8).reshape(6, 3, 3, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.silu(torch.nn.functional.conv2d(x, weight, bias, padding=1))
    torch.testing.assert_close(op(x, values, meta, bias, **window, activation="silu"), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"weight_values and weight_meta must have 4 and 1 columns"):
        op(x, values[:, :2], meta, **window)
    with pytest.raises(TypeError, match="weight_meta must be uint8"):
        op(x, values, meta.float(), **window)
