"""Convolutional networks of Hugging Face transformers, from small configurations with random weights."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.compile_fx import compile_fx

import tilewright as tw
from tests.convert.networks import source_of
from tests.convert.test_conv_int8 import sqnr

tf = pytest.importorskip("transformers", reason="the extra `hf` is not installed")


def variance_preserving(model: nn.Module) -> nn.Module:
    """``model`` with weights at which activations neither die out nor grow, as the library's own do in these nets."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out" if module.groups == 1 else "fan_in")
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.8, 1.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.9, 1.1)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def resnet(layer_type: str) -> nn.Module:
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": layer_type}
    return tf.ResNetForImageClassification(tf.ResNetConfig(**sizes))


def efficientnet() -> nn.Module:
    sizes = {"width_coefficient": 0.5, "depth_coefficient": 0.5, "image_size": 64, "hidden_dim": 640}
    return tf.EfficientNetForImageClassification(tf.EfficientNetConfig(**sizes))


def regnet(layer_type: str) -> nn.Module:
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2], "groups_width": 8}
    return tf.RegNetForImageClassification(tf.RegNetConfig(**sizes, layer_type=layer_type))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet_bottleneck": lambda: resnet("bottleneck"),
    "resnet_basic": lambda: resnet("basic"),
    "mobilenet_v2": lambda: tf.MobileNetV2ForImageClassification(
        tf.MobileNetV2Config(depth_multiplier=0.35, image_size=64)
    ),
    "convnext": lambda: tf.ConvNextForImageClassification(
        tf.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2)
    ),
    "efficientnet": efficientnet,
    "regnet_x": lambda: regnet("x"),
    "regnet_y": lambda: regnet("y"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return variance_preserving(MODELS[request.param]())


def pixels(batch: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


@torch.no_grad()
def test_fused_gives_the_same(model: nn.Module) -> None:
    fused = tw.convert_model(model, "fuse")
    assert type(fused) is type(model)
    assert not any(isinstance(part, (nn.modules.conv._ConvNd, nn.BatchNorm2d)) for part in fused.modules())
    for given in (pixels(), pixels(), pixels(3, 65)):
        exact = copy.deepcopy(model).double()(given.double()).logits
        plain, ours = ((m(given).logits.double() - exact).norm() / exact.norm() for m in (model, fused))
        assert ours < 4 * plain + 2e-6
    y = fused(pixel_values=given)
    assert type(y) is type(model(given))
    torch.testing.assert_close(fused(given, return_dict=True).logits, y.logits, rtol=1e-3, atol=1e-4)
    reported = tw.report(fused)
    assert not reported.untraced
    assert all(layer.kind == "Linear" for layer in reported.skipped)


@torch.no_grad()
def test_hidden_states_come_from_the_class_s_forward(model: nn.Module) -> None:
    fused, given = tw.convert_model(model, "fuse"), pixels()
    # A copy, because transformers puts hooks on a model that was asked once, and they stay.
    ours, theirs = (m(given, output_hidden_states=True).hidden_states for m in (fused, copy.deepcopy(model)))
    assert theirs is not None and len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()


@torch.no_grad()
def test_int8_is_close(model: nn.Module) -> None:
    data = [pixels(8), {"pixel_values": pixels(8)}]
    converted = tw.convert_model(model, "int8", calibration_data=data)
    given = pixels(8)
    assert sqnr(converted(given).logits, model(given).logits) > 20
    for layer in tw.report(converted).layers:
        assert layer.scheme or "head" in layer.reason, layer.name
        if layer.scheme.startswith("fuse"):
            assert "pooled image of one pixel" in layer.reason


@pytest.mark.parametrize("name", ["resnet_bottleneck", "mobilenet_v2", "regnet_x"])
def test_int8_from_end_to_end(name: str) -> None:
    """MobileNetV2 pads by the size of its input, at which a tensor between two layers is then looked at."""
    torch.manual_seed(0)
    converted = tw.convert_model(variance_preserving(MODELS[name]()), "int8", calibration_data=[pixels()])
    source = source_of(converted)
    assert source.count("_quantize(") == 1 and "dequantize(" not in source


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 96, 224])
@torch.no_grad()
def test_int8_keeps_a_whole_resnet50(size: int) -> None:
    """With the library's own random weights. Two logits, its default, may all but cancel: of a thousand most do not."""
    torch.manual_seed(0)
    model = tf.ResNetForImageClassification(tf.ResNetConfig(num_labels=1000)).eval()
    converted = tw.convert_model(model, "int8", calibration_data=[pixels(8, size), pixels(8, size)])
    given = pixels(8, size)
    assert sqnr(converted(given).logits, model(given).logits) > 30


@torch.no_grad()
def test_saved_and_loaded(model: nn.Module, tmp_path: Path) -> None:
    given = pixels()
    converted = tw.convert_model(model, "int8", calibration_data=[given])
    tw.save_model(converted, tmp_path)
    config: Any = model.config
    loaded = tw.load_model(tmp_path, lambda: type(model)(config))
    torch.testing.assert_close(loaded(given).logits, converted(given).logits, rtol=1e-6, atol=1e-6)
    assert vars(loaded)["forward"].source == vars(converted)["forward"].source


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler, and there is none"
)
@pytest.mark.parametrize("recipe", ["fuse", "int8"])
@torch.no_grad()
def test_a_whole_resnet50_compiles_to_one_graph(recipe: str) -> None:
    torch.manual_seed(0)
    model = variance_preserving(tf.ResNetForImageClassification(tf.ResNetConfig()))
    converted = tw.convert_model(model, recipe, calibration_data=[pixels(4)])
    graphs: list[int] = []

    def inductor(graph: Any, inputs: Any) -> Any:
        graphs.append(sum("conv2d_fused" in str(node.target) for node in graph.graph.nodes))
        return compile_fx(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(converted, fullgraph=True, backend=inductor)
    for given in (pixels(2), pixels(2)):
        torch.testing.assert_close(compiled(given).logits, converted(given).logits, rtol=1e-4, atol=1e-4)
    assert graphs == [53], "one graph with every convolution in it"
