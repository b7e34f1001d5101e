"""ONNX export: in ONNX Runtime the file computes what the module does, with the weights bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tilewright as tw
from bench.tables.compile_modes import Residual
from tilewright.deploy.onnx.lower import nbits_block, nbits_weight

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def run(path: Path, *inputs: torch.Tensor) -> torch.Tensor:
    options = ort.SessionOptions()
    # By itself it rounds activations to int8 for the product with a dequantised int8 weight.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0])


def layers(width: int = 96, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 64, bias), nn.GELU(), nn.Linear(64, 40), nn.SiLU(), nn.Linear(40, 48)).eval()


def exact(model: nn.Module) -> nn.Module:
    """Products in the type of the activation: ONNX Runtime's CPU knows no bfloat16 to round to."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = None
    return model


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


@pytest.mark.parametrize(
    "recipe, expected",
    [
        ("int4-g32", "MatMulNBits"),
        ("int4-symmetric", "MatMulNBits"),
        ("int8-int4-g32", "MatMulNBits"),
        ("int8-weight-only", "DequantizeLinear"),
        ("int8", "MatMulInteger"),
    ],
)
def test_a_converted_model_runs_in_onnx_runtime_at_any_batch(recipe: str, expected: str, tmp_path: Path) -> None:
    model, path = exact(tw.convert_model(layers(), recipe)), tmp_path / "model.onnx"
    written = tw.export_onnx(model, path, torch.randn(1, 96))
    onnx.checker.check_model(path)
    assert written.operators[expected] == 3
    assert written.bytes == path.stat().st_size and "KiB" in str(written)
    for batch in (1, 7):
        x = torch.randn(batch, 96)
        with torch.no_grad():
            # An int8 step may round the other way where a sum ended in another last bit.
            slack = 0.02 if recipe.startswith("int8") and recipe != "int8-weight-only" else 1e-5
            torch.testing.assert_close(run(path, x), model(x), rtol=slack, atol=slack)


class Reads(nn.Module):
    """Multiplies with a weight instead of calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(96, 64), nn.Linear(64, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(nn.functional.linear(x, self.read.weight, self.read.bias).relu())


@pytest.mark.parametrize("recipe", ["int8", "int4-g32", "sparse24", "sparse24-int4"])
def test_a_weight_that_is_read_is_dequantised_in_the_graph(recipe: str, tmp_path: Path) -> None:
    model, path, x = exact(tw.convert_model(Reads().eval(), recipe)), tmp_path / "model.onnx", torch.randn(7, 96)
    tw.export_onnx(model, path, x)
    with torch.no_grad():
        slack = 0.02 if recipe == "int8" else 1e-4
        torch.testing.assert_close(run(path, x), model(x), rtol=slack, atol=slack)


def test_the_packed_weight_is_the_state_dict_byte_for_byte(tmp_path: Path) -> None:
    model = tw.convert_model(nn.Sequential(nn.Linear(128, 24)), "int4-g32").eval()
    path = tmp_path / "model.onnx"
    tw.export_onnx(model, path, torch.randn(2, 128))
    held = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
    assert held["0.weight_nbits"].tobytes() == model[0].weight_packed.numpy().tobytes()
    np.testing.assert_array_equal(held["0.scales"], model[0].weight_scale.float().numpy())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "n, k, group", [(5, 64, 32), (8, 100, 32), (3, 40, 40), (16, 512, None), (7, 600, None), (9, 96, 48), (1, 1, 32)]
)
def test_any_group_and_shape_is_what_the_definition_dequantises(
    n: int, k: int, group: int | None, symmetric: bool
) -> None:
    layer = exact(
        tw.nn.Int4Linear.from_float(nn.Linear(k, n), group_size=group, symmetric=symmetric, range_search="minmax")
    ).eval()
    data, scales, zero, block = nbits_weight(
        layer.weight_packed, layer.weight_scale.float(), layer.weight_zero, layer.group_size, k
    )
    assert data.shape == (n, -(-k // block), block // 2) and scales.shape == data.shape[:2]
    values = torch.stack([data & 15, data >> 4], -1).reshape(n, -1, block).float()
    offset = 8.0
    if zero is not None:
        offset = torch.stack([zero & 15, zero >> 4], -1).reshape(n, -1)[:, : scales.shape[1], None].float()
    unpacked = ((values - offset) * scales.unsqueeze(-1)).reshape(n, -1)[:, :k]
    assert torch.equal(unpacked, layer.dequantize_weight())


@pytest.mark.parametrize("k, group", [(100, 32), (600, None), (96, 48)])
def test_ragged_groups_run_in_onnx_runtime(k: int, group: int | None, tmp_path: Path) -> None:
    layer = exact(tw.nn.Int4Linear.from_float(nn.Linear(k, 9), group_size=group, range_search="minmax")).eval()
    path, x = tmp_path / "model.onnx", torch.randn(4, k)
    tw.export_onnx(layer, path, torch.randn(3, k))
    with torch.no_grad():
        torch.testing.assert_close(run(path, x), layer(x), rtol=1e-4, atol=1e-4)


def test_groups_that_blocks_cannot_hold_are_refused() -> None:
    assert (nbits_block(32, 128), nbits_block(48, 96), nbits_block(512, 512)) == (32, 16, 256)
    with pytest.raises(ValueError, match="groups of 20"):
        nbits_block(20, 100)


@pytest.mark.parametrize("recipe", ["fuse", "int8"])
def test_convolutions_run_in_onnx_runtime(recipe: str, tmp_path: Path) -> None:
    model, path = Residual().eval(), tmp_path / "model.onnx"
    data = [torch.randn(4, 3, 32, 32) for _ in range(2)] if recipe == "int8" else None
    model = tw.convert_model(model, recipe, calibration_data=data)
    written = tw.export_onnx(model, path, torch.randn(2, 3, 32, 32))
    onnx.checker.check_model(path)
    assert written.operators["Conv"] == 2
    if recipe == "int8":
        assert written.operators["QuantizeLinear"] >= 1 and written.operators["DequantizeLinear"] >= 4
    for batch in (1, 5):
        x = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            expected = model(x)
        # A value halfway between two int8 steps may go to either: one step of 1/127.
        slack = 1e-5 if recipe == "fuse" else 0.01
        torch.testing.assert_close(run(path, x), expected, rtol=slack, atol=slack * expected.abs().max().item())


def test_a_row_with_nan_is_nan_if_that_comes_first(tmp_path: Path) -> None:
    """ONNX Runtime's ReduceMax loses one that does not (1.32.0, microsoft/onnxruntime#10514): docs/torch_compile.md."""
    model, path, x = tw.convert_model(layers(), tw.Int8Dynamic()), tmp_path / "model.onnx", torch.randn(3, 96)
    tw.export_onnx(model, path, x)
    for column in (0, 50):
        spoilt = x.clone()
        spoilt[1, column] = torch.nan
        with torch.no_grad():
            expected = model(spoilt)
        assert expected[1].isnan().all() and not expected[::2].isnan().any()
        found = run(path, spoilt)
        torch.testing.assert_close(found[::2], expected[::2], rtol=0.02, atol=0.02)
        assert column or found[1].isnan().all()


def test_zero_points_are_even(tmp_path: Path) -> None:
    """With odd ones tools disagree on ties: findings/odd_zero_point_ties.sh."""
    data, path = [torch.randn(2, 3, 32, 32) for _ in range(2)], tmp_path / "model.onnx"
    tw.export_onnx(tw.convert_model(Residual().eval(), "int8", calibration_data=data), path, data[0])
    graph = onnx.load(path).graph
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    zeros = [constants[node.input[2]].item() for node in nodes]
    assert any(zeros) and all(zero % 2 == 0 for zero in zeros)


def test_static_int8_linear_layers_are_standard_qdq(tmp_path: Path) -> None:
    data = [torch.randn(64, 96) for _ in range(2)]
    model, path = tw.convert_model(layers(), "int8-static", calibration_data=data), tmp_path / "model.onnx"
    written = tw.export_onnx(model, path, data[0])
    onnx.checker.check_model(path)
    counts = {"QuantizeLinear": 3, "DequantizeLinear": 6, "MatMul": 3}
    assert {name: written.operators.get(name) for name in counts} == counts
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    for batch in (1, 7):
        x = torch.randn(batch, 96)
        with torch.no_grad():
            expected = model(x)
        # A value halfway between two int8 steps may go to either.
        torch.testing.assert_close(run(path, x), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("recipe", ["int8", "int8-static"])
def test_what_is_not_finite_is_seen_behind_static_int8(recipe: str, bad: float, tmp_path: Path) -> None:
    network, x = (Residual(), torch.randn(4, 3, 32, 32)) if recipe == "int8" else (layers(), torch.randn(4, 96))
    path = tmp_path / "model.onnx"
    tw.export_onnx(tw.convert_model(network.eval(), recipe, calibration_data=[x]), path, x)
    clean = run(path, x)
    for place in (0, -1):
        spoilt = x.clone()
        spoilt[2].view(-1)[place] = bad
        y = run(path, spoilt)
        assert y[2].isnan().all() and torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]]) and clean.isfinite().all()


@pytest.mark.parametrize(
    "recipe, expected",
    [("sparse24", "MatMul"), ("sparse24-int8", "MatMulInteger"), ("sparse24-int4", "MatMulNBits")],
)
def test_weights_that_are_2_of_4_are_written_with_their_zeros(recipe: str, expected: str, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 48)).eval()
    schemes = {
        "sparse24": tw.Sparse24(pruning="magnitude", compute_dtype=None),
        "sparse24-int8": tw.Sparse24Int8(pruning="magnitude"),
        "sparse24-int4": tw.Sparse24Int4(pruning="magnitude", group_size=32),
    }
    model, path = exact(tw.convert_model(network, schemes[recipe])), tmp_path / "model.onnx"
    written = tw.export_onnx(model, path, torch.randn(2, 96))
    onnx.checker.check_model(path)
    assert written.operators[expected] == 2
    x = torch.randn(5, 96)
    with torch.no_grad():
        slack = 0.02 if recipe == "sparse24-int8" else 1e-5
        torch.testing.assert_close(run(path, x), model(x), rtol=slack, atol=slack)


def test_convolutions_that_are_2_of_4_are_written_with_their_zeros(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(16, 6, 1)).eval()
    model, path = tw.convert_model(network, "sparse24-conv"), tmp_path / "model.onnx"
    written = tw.export_onnx(model, path, torch.randn(2, 8, 9, 9))
    assert written.operators["Conv"] == 2
    x = torch.randn(3, 8, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(run(path, x), model(x), rtol=1e-4, atol=1e-4)


def test_int8_images_pool_and_pad(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 16, 3, padding="same")
    ).eval()
    data = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    model, path = tw.convert_model(model, "int8", calibration_data=data), tmp_path / "model.onnx"
    tw.export_onnx(model, path, data[0])
    with torch.no_grad():
        expected = model(data[1])
    torch.testing.assert_close(run(path, data[1]), expected, rtol=0.01, atol=0.01 * expected.abs().max().item())


@pytest.mark.slow
def test_a_model_of_transformers_with_two_inputs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=99), add_pooling_layer=False).eval()
    model, path = exact(tw.convert_model(bert, "int4-g32")), tmp_path / "model.onnx"
    inputs = {"input_ids": torch.randint(0, 99, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    tw.export_onnx(model, path, inputs)
    wider = {name: value.repeat(2, 1)[:3] for name, value in inputs.items()}
    with torch.no_grad():
        expected = model(**wider).last_hidden_state
    torch.testing.assert_close(run(path, *wider.values()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_half_precision(tmp_path: Path) -> None:
    model, path = tw.convert_model(layers(bias=False).half(), "int4-g32"), tmp_path / "model.onnx"
    tw.export_onnx(model, path, torch.randn(2, 96).half())
    x = torch.randn(3, 96).half()
    with torch.no_grad():
        torch.testing.assert_close(run(path, x), model(x), rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_accuracy_is_what_onnx_runtime_is_told(tmp_path: Path) -> None:
    model = tw.convert_model(layers(), "int4-g32")
    for accuracy, level in (("float32", 1), ("int8", 4)):
        path = tmp_path / f"{accuracy}.onnx"
        tw.export_onnx(model, path, torch.randn(2, 96), accuracy=accuracy)
        nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
        levels = {attribute.i for node in nodes for attribute in node.attribute if attribute.name == "accuracy_level"}
        assert levels == {level}
        assert run(path, torch.randn(2, 96)).isfinite().all()


def test_weights_beside_the_model(tmp_path: Path) -> None:
    model, path = exact(tw.convert_model(layers(), "int4-g32")), tmp_path / "model.onnx"
    written = tw.export_onnx(model, path, torch.randn(2, 96), external_data=True)
    assert written.data_path == tmp_path / "model.onnx.data" and written.data_path.exists()
    x = torch.randn(2, 96)
    with torch.no_grad():
        torch.testing.assert_close(run(path, x), model(x), rtol=1e-5, atol=1e-5)
    written = tw.export_onnx(model, path, x)
    assert written.data_path is None and sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx"]


@pytest.mark.slow
def test_weights_that_do_not_fit_go_into_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewright.deploy.onnx import export as onnx_export

    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 1000)
    model, path = tw.convert_model(layers(), "int4-g32"), tmp_path / "model.onnx"
    assert tw.export_onnx(model, path, torch.randn(2, 96)).data_path is not None
    with pytest.raises(ValueError, match="do not fit into one ONNX file"):
        tw.export_onnx(model, path, torch.randn(2, 96), external_data=False)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"example_inputs": 3}, TypeError, "example_inputs is a tensor"),
        ({"example_inputs": (torch.randn(2, 96), torch.randn(3, 96))}, ValueError, "first dimensions"),
        ({"example_inputs": torch.randn(0, 96)}, ValueError, "empty batch"),
        ({"example_inputs": torch.randn(2, 96), "accuracy": "int4"}, ValueError, "accuracy 'int4' is unknown"),
    ],
    ids=["number", "ragged", "empty", "accuracy"],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], words: str, tmp_path: Path) -> None:
    model = tw.convert_model(layers(), "int4-g32")
    with pytest.raises(error, match=words):
        tw.export_onnx(model, tmp_path / "model.onnx", **options)
    with pytest.raises(ValueError, match="training mode"):
        tw.export_onnx(model.train(), tmp_path / "model.onnx", torch.randn(2, 96))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_failed_export_leaves_the_old_file(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    path = tmp_path / "model.onnx"
    path.write_text("old")
    with pytest.raises(Exception, match="."):
        tw.export_onnx(Branches().eval(), path, torch.randn(2, 4))
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_rows_without_a_number_stay_without_one(tmp_path: Path) -> None:
    model, path = tw.convert_model(layers(), "int8"), tmp_path / "model.onnx"
    tw.export_onnx(model, path, torch.randn(2, 96))
    x = torch.randn(3, 96)
    x[0], x[1] = 0.0, torch.nan
    y = run(path, x)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
