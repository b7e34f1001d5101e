"""The way around the dispatcher is taken where nobody looks, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tilewright.nn as tnn
from tilewright.kernels import eager, operators


@pytest.fixture
def layer() -> tnn.Int8Linear:
    torch.manual_seed(0)
    return tnn.Int8Linear.from_float(nn.Linear(32, 16)).eval()


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], bool]:
    """Whether a call goes through the dispatcher."""
    if eager._watchers is None:
        pytest.skip("this version of PyTorch always goes through the dispatcher")
    direct: list[bool] = []
    unwatched = eager.unwatched

    def noted(*args: Any) -> bool:
        direct.append(unwatched(*args))
        return direct[-1]

    monkeypatch.setattr(eager, "unwatched", noted)

    def ask(call: Callable[[], Any]) -> bool:
        direct.clear()
        call()
        assert direct
        return not any(direct)

    return ask


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_leaves_the_dispatcher_out(layer: Any, dispatched: Any, mode: Any):
    x = torch.randn(3, 32)
    expected = torch.ops.tilewright.int8_linear(x, layer.weight, layer.weight_scale, layer.bias, None, "none", None)
    with mode():
        assert not dispatched(lambda: layer(x))
        assert torch.equal(layer(x), expected)
        assert layer(x).requires_grad is False


def test_gradients_reach_the_activations(layer: Any, dispatched: Any):
    x = torch.randn(3, 32, requires_grad=True)
    assert dispatched(lambda: layer(x).sum().backward())
    assert torch.allclose(x.grad, layer.dequantize_weight().sum(0).expand(3, -1), rtol=1e-5, atol=1e-6)


def test_modes_autocast_and_the_profiler_see_the_operator(layer: Any, dispatched: Any):
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, 32)
    with torch.no_grad():
        with Watch():
            assert dispatched(lambda: layer(x))
        assert "tilewright.int8_linear.default" in seen
        with torch.autocast("cpu", torch.bfloat16):
            assert dispatched(lambda: layer(x))
            assert layer(x).dtype == torch.bfloat16
        with torch.profiler.profile() as profile:
            assert dispatched(lambda: layer(x))
        assert "tilewright::int8_linear" in {event.key for event in profile.key_averages()}
        with torch.autograd.forward_ad.dual_level():
            assert dispatched(lambda: layer(x))


def test_subclasses_dispatch_for_themselves(layer: Any, dispatched: Any):
    class Named(torch.Tensor):
        pass

    with torch.no_grad():
        assert dispatched(lambda: layer(torch.randn(3, 32).as_subclass(Named)))
        assert isinstance(layer(torch.randn(3, 32).as_subclass(Named)), Named)


def test_compiled_graphs_hold_the_operator(layer: Any):
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(3, 32)
    with torch.no_grad():
        y = torch.compile(layer, backend=backend, fullgraph=True)(x)
        assert torch.equal(y, layer(x))
        exported = torch.export.export(layer, (x,))
    assert "int8_linear" in graphs[0].code
    assert "tilewright.int8_linear" in exported.graph_module.code


def test_arguments_are_checked_on_the_short_way(layer: Any):
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match="residual"):
        layer(torch.randn(3, 32), torch.randn(3, 15))
    assert operators.kernel_of("int8_linear")
