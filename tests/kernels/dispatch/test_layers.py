"""Short cuts around the dispatcher are taken where nobody looks and nothing has changed, and nowhere else."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tilewright.nn as tnn
from tilewright.kernels.cpu import native
from tilewright.kernels.dispatch import layers, router

#: Calls after which the next one goes the shortest way: the second prepares a function, the third remembers it.
SHORTEST = 4
LAYERS = {
    "int8": lambda linear: tnn.Int8Linear.from_float(linear),
    "int8, scaled": lambda linear: tnn.Int8Linear.from_float(linear, channel_scale=torch.rand(32) + 0.5),
    "int8 x int4": lambda linear: tnn.Int8ActInt4WeightLinear.from_float(linear, group_size=16, range_search="minmax"),
    "int8, weight only": lambda linear: tnn.Int8WeightOnlyLinear.from_float(linear),
    "int4": lambda linear: tnn.Int4Linear.from_float(linear, group_size=16, range_search="minmax"),
    "2:4": lambda linear: tnn.Sparse24Linear.from_float(linear),
    "2:4 in float32": lambda linear: tnn.Sparse24Linear.from_float(linear, values_dtype=None, compute_dtype=None),
    "2:4 int8": lambda linear: tnn.Sparse24Int8Linear.from_float(linear),
    "2:4 int4": lambda linear: tnn.Sparse24Int4Linear.from_float(linear, group_size=16, range_search="minmax"),
}


@pytest.fixture
def layer() -> tnn.Int8Linear:
    torch.manual_seed(0)
    return tnn.Int8Linear.from_float(nn.Linear(32, 16)).eval()


@pytest.fixture
def dispatched() -> Callable[[Callable[[], Any]], bool]:
    """Whether the third of three calls goes through the dispatcher."""
    if layers._watchers is None:
        pytest.skip("needs a PyTorch whose dispatcher can be asked who watches it")
    if native.why_no_native():
        pytest.skip(str(native.why_no_native()))

    def ask(call: Callable[[], Any]) -> bool:
        found: list[Any] = []
        prepared_call = layers.prepared_call

        def noted(*args: Any) -> Any:
            found.append(prepared_call(*args))
            return found[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tilewright.nn.quantized_linear.prepared_call", noted)
            for _ in range(3):
                call()
        assert len(found) == 3
        return found[-1] is None

    return ask


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_leaves_the_dispatcher_out(layer: Any, dispatched: Any, mode: Any):
    x = torch.randn(3, 32)
    expected = torch.ops.tilewright.int8_linear(
        x, layer.weight_codes, layer.weight_scale, layer.bias, None, "none", None
    )
    with mode():
        assert not dispatched(lambda: layer(x))
        assert torch.equal(layer(x), expected)
        assert layer(x).requires_grad is False


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("m", [1, 40])
def test_every_kind_of_layer_has_a_short_way(kind: str, m: int, dispatched: Any):
    layer = LAYERS[kind](nn.Linear(32, 16))
    with torch.no_grad():
        assert not dispatched(lambda: layer(torch.randn(m, 32)))


def test_gradients_reach_the_activations(layer: Any, dispatched: Any):
    x = torch.randn(3, 32, requires_grad=True)
    assert dispatched(lambda: layer(x))
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.allclose(gradient, layer.dequantize_weight().sum(0).expand(3, -1), rtol=1e-5, atol=1e-6)


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


def operator_of(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The result by way of the operator."""
    with torch.enable_grad():
        return layer(x).detach()


@pytest.mark.parametrize("kind", LAYERS)
def test_whatever_is_changed_is_noticed(kind: str):
    torch.manual_seed(0)
    layer = LAYERS[kind](nn.Linear(32, 16))
    x = torch.randn(5, 32)

    def check() -> None:
        with torch.no_grad():
            for _ in range(SHORTEST):
                assert torch.equal(layer(x), operator_of(layer, x))

    factor = "weight_scale" if hasattr(layer, "weight_scale") else "weight_values"
    check()
    with torch.no_grad():
        getattr(layer, factor).mul_(2)
        check()
        layer.bias.add_(1)
        check()
        setattr(layer, factor, getattr(layer, factor) * 0.5)
        check()
        layer.bias = None
        check()
    layer.load_state_dict(LAYERS[kind](nn.Linear(32, 16)).state_dict(), strict=False)
    check()
    layer.activation = "relu"
    check()
    copied = copy.deepcopy(layer)
    getattr(copied, factor).zero_()
    with torch.no_grad():
        assert not copied(x).any() or copied.bias is not None
    check()
    layer.to(torch.bfloat16)
    x = x.bfloat16()
    check()
    x = torch.randn(2, 7, 64, dtype=torch.bfloat16)[..., ::2]
    check()
    x = torch.randn(32, dtype=torch.bfloat16)
    check()
    x = torch.randn(0, 32)
    check()


def test_another_router_is_asked(layer: Any, dispatched: Any):
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert not dispatched(lambda: layer(x))
        router.register(
            router.Implementation("twice", "int8_linear", lambda problem: None, f"{__name__}:twice"), before="C kernel"
        )
        try:
            assert (layer(x) == 2).all()
            assert dispatched(lambda: layer(x))
        finally:
            router.unregister("int8_linear", "twice")
        assert not dispatched(lambda: layer(x))


def twice(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
    """Not a product."""
    return torch.full((*x.shape[:-1], len(weight)), 2.0)


def test_a_layer_can_be_pickled_and_freed(layer: Any):
    with torch.no_grad():
        for _ in range(SHORTEST):
            y = layer(torch.ones(1, 32))
        again = pickle.loads(pickle.dumps(layer))  # noqa: S301  (our own bytes)
        assert torch.equal(again(torch.ones(1, 32)), y)
    weight = weakref.ref(layer.weight_codes)
    layer.weight_codes = layer.weight_codes.clone()
    assert weight() is None


def test_arguments_are_checked_on_the_short_way(layer: Any):
    with torch.no_grad():
        for _ in range(SHORTEST):
            layer(torch.randn(3, 32))
        with pytest.raises((ValueError, TypeError), match="residual"):
            layer(torch.randn(3, 32), torch.randn(3, 15))
        with pytest.raises(ValueError, match="last dimension is 32"):
            layer(torch.randn(3, 31))
        with pytest.raises(TypeError, match="float input"):
            layer(torch.ones(3, 32, dtype=torch.int32))
        with pytest.raises((ValueError, TypeError, NotImplementedError), match="complex|float"):
            layer(torch.ones(3, 32, dtype=torch.complex64))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_call_reads_no_memory_that_is_freed(kind: str):
    """``.data`` changes a tensor's memory without counting as a write; see contracts/test_replaced_storage.py."""
    torch.manual_seed(0)
    layer, x = LAYERS[kind](nn.Linear(32, 16)), torch.randn(5, 32)
    for name in [*dict(layer.named_parameters()), *dict(layer.named_buffers())]:
        with torch.no_grad():
            for _ in range(SHORTEST):
                layer(x)
            tensor = getattr(layer, name)
            tensor.data = (tensor.data * 0.5).to(tensor.dtype)
            garbage = [torch.full((tensor.untyped_storage().nbytes() // 4,), torch.nan) for _ in range(20)]
            y = layer(x)
        del garbage
        assert torch.equal(y, operator_of(layer, x)), name


@pytest.mark.parametrize("kind", LAYERS)
def test_what_the_operator_refused_is_not_prepared(kind: str):
    """The first call after a change is checked, and ends in an error; the second must not pass by the check."""
    layer, x = LAYERS[kind](nn.Linear(32, 16)), torch.randn(5, 32)
    name = next(name for name in ("weight_codes", "weight_packed", "weight_values") if name in layer._buffers)
    with torch.no_grad():
        for _ in range(SHORTEST):
            layer(x)
        getattr(layer, name).data = getattr(layer, name).data[:-1]
        for _ in range(4):
            with pytest.raises((ValueError, RuntimeError)):
                layer(x)
