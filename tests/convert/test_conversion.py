"""The steps that a conversion goes through: regions are traced once, and a new kind of layer is one file."""

from __future__ import annotations

import ast
import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from tests.convert.networks import Inception, SmallMobileNet, SmallResNet, programs_of, settled, source_of
from tilewright.convert import conversion
from tilewright.convert.conversion import Conversion, Job, register_conversion
from tilewright.convert.graph import tracing
from tilewright.convert.plan import Planned
from tilewright.convert.record import LayerRecord, record_of
from tilewright.convert.schemes import Scheme, base, register_scheme

CONVERT = Path(conversion.__file__).parent


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each region was traced, by name."""
    counts: Counter[str] = Counter()
    trace = tracing.trace

    def counting(name: str, *options: Any) -> tracing.Region:
        counts[name] += 1
        return trace(name, *options)

    monkeypatch.setattr(tracing, "trace", counting)
    return counts


@pytest.mark.parametrize("net, channels", [(SmallResNet, 1), (SmallMobileNet, 1), (Inception, 12)])
@pytest.mark.parametrize("recipe", ["fuse", "int8"])
def test_each_region_is_traced_once(net: type[nn.Module], channels: int, recipe: str, traces: Counter[str]) -> None:
    model = settled(net())
    converted = tw.convert_model(model, recipe, calibration_data=[torch.randn(2, channels, 32, 32)])
    assert traces == dict.fromkeys(programs_of(converted), 1) == {"": 1}


def test_what_is_called_otherwise_is_taken_apart_and_the_rest_not_traced_again(
    traces: Counter[str],
) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
            y = self.conv(x)
            return y + y if twice else y

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Part(), Part()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 1e9:  # cannot be traced
                return x
            return self.a(x, twice=True) + self.b(x)

    converted = tw.convert_model(Model().eval(), "int8", calibration_data=[torch.randn(2, 3, 16, 16)])
    assert traces == {"": 1, "a": 1, "b": 1} and set(programs_of(converted)) == {"b"}
    assert "another twice" in record_of(converted).untraced["a"]


class Act(nn.Module):
    """An activation that no table knows, but whose code is one that an epilogue does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x)


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's."""

    def __init__(self, channels: int, act: nn.Module):
        super().__init__(channels)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


@pytest.mark.parametrize("act, word", [(nn.ReLU(), "relu"), (Act(), "silu"), (nn.Sequential(Act()), "silu")])
@torch.no_grad()
def test_what_a_folded_norm_did_besides_is_fused_too(act: nn.Module, word: str, tmp_path: Path) -> None:
    torch.manual_seed(0)

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, act), nn.Conv2d(8, 8, 3)).eval()

    model, x = make(), torch.randn(2, 3, 16, 16)
    converted = tw.convert_model(model, "fuse")
    assert f"'{word}'" in source_of(converted)
    assert record_of(converted).layers["0"].label.endswith(f" + {word}")
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    tw.save_model(converted, tmp_path)
    assert source_of(tw.load_model(tmp_path, make)) == source_of(converted)


def test_after_a_failure_in_place_the_model_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(settled(SmallResNet()), nn.Linear(10, 64), nn.Linear(64, 128)).eval()
    x, build = torch.randn(2, 1, 32, 32), tw.Int8Dynamic.build

    def failing(scheme: Any, module: nn.Module, **options: Any) -> nn.Module:
        if module.in_features == 64:
            raise OSError("no")
        return build(scheme, module, **options)

    monkeypatch.setattr(tw.Int8Dynamic, "build", failing)
    expected = model(x)
    with pytest.raises(RuntimeError, match="converting the layer '2' failed: no"):
        tw.convert_model(model, "int8", calibration_data=[x], inplace=True)
    assert programs_of(model) and {"1", "0.conv1"} <= set(record_of(model).layers)
    assert (model(x) - expected).norm() < 0.2 * expected.norm()


# ---- a new kind of layer
@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> type[Scheme]:
    """A scheme for embeddings, with a conversion of its own: what a plugin would add in one file."""
    monkeypatch.setattr(base, "_registered", dict(base._registered))
    monkeypatch.setattr(conversion, "_registered", dict(conversion._registered))

    @register_conversion("embeddings")
    class Embeddings(Conversion):
        steps: list[str]

        def __init__(self, job: Job, planned: dict[str, Planned]):
            super().__init__(job, planned)
            self.steps = []

        def prepare(self, sample: Any) -> None:
            self.steps.append(f"prepare {list(sample.shape)}")

        @contextlib.contextmanager
        def observing(self) -> Iterator[None]:
            self.steps.append("observe")
            yield

        def replace(self, samples: list[Any]) -> None:
            for name, planned in self.planned.items():
                old = self.job.model.get_submodule(name)
                self.job.replace(name, old, planned.scheme.build(old))
                self.job.record.layers[name] = LayerRecord(planned.scheme.to_json(), str(planned.scheme), 2, 1)
            self.steps.append(f"replace {len(samples)}")

        def finish(self) -> None:
            seen.append([*self.steps, "finish"])

    @register_scheme
    @dataclass(frozen=True)
    class Halved(Scheme):
        about = "embeddings"
        conversion = "embeddings"

        @classmethod
        def supports(cls, module: nn.Module) -> bool:
            return isinstance(module, nn.Embedding)

        def why_not(self, module: nn.Module) -> str | None:
            return None

        def build(self, module: nn.Module, **calibration: Any) -> nn.Module:
            return nn.Embedding.from_pretrained(module.weight.detach().bfloat16())  # type: ignore[union-attr, operator]

    seen: list[list[str]] = []
    Halved.seen = seen  # type: ignore[attr-defined]
    return Halved


def test_a_new_kind_of_layer_goes_through_the_same_steps(halved: Any) -> None:
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64))
    recipe = tw.Recipe([("*", halved()), ("*", "int8")])
    converted = tw.convert_model(model, recipe, calibration_data=[torch.arange(4)])
    assert converted[0].weight.dtype == torch.bfloat16 and type(converted[1]).__name__ == "Int8Linear"
    assert halved.seen == [["prepare [4]", "observe", "replace 1", "finish"]]
    assert set(record_of(converted).layers) == {"0", "1"} and model[0].weight.dtype == torch.float32


def test_a_scheme_without_a_conversion_is_named(halved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halved, "conversion", "tapestries")
    with pytest.raises(ValueError, match="asks for a conversion of tapestries; known: "):
        tw.convert_model(nn.Sequential(nn.Embedding(10, 64)), halved())


# ---- rooms
FILES = [path for path in sorted(CONVERT.rglob("*.py")) if path.parent.name != "graph"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONVERT)))
def test_what_is_asked_of_a_graph_is_asked_through_the_interface(path: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    inside = [node.module for node in imports if str(node.module).startswith("tilewright.convert.graph.")]
    assert not inside, f"{path.name} imports files of the room: ask tilewright.convert.graph instead"
