"""Operators that are called again with the same weights: the same results, and what changed is noticed."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tilewright.nn as tnn
from tilewright.kernels.cpu import native
from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.layers import Repeats

pytestmark = pytest.mark.skipif(native.why_no_native() is not None, reason=str(native.why_no_native()))
KINDS = {
    "int8": lambda linear: tnn.Int8Linear.from_float(linear, channel_scale=torch.rand(32) + 0.5),
    "int8-int4": lambda linear: tnn.Int8ActInt4WeightLinear.from_float(linear, group_size=16),
}


@pytest.fixture(params=sorted(KINDS))
def layer(request: Any) -> Any:
    torch.manual_seed(0)
    return KINDS[request.param](nn.Linear(32, 16)).eval()


@pytest.fixture
def shortened(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each look-up whether it found something."""
    found: list[bool] = []
    find = Repeats.find

    def noted(self: Repeats, *args: Any) -> Any:
        call = find(self, *args)
        found.append(call is not None)
        return call

    monkeypatch.setattr(Repeats, "find", noted)
    return found


def call(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None, activation: str = "none") -> torch.Tensor:
    """The operator itself, as a compiled graph calls it."""
    operator = getattr(torch.ops.tilewright, layer.op_name).default
    given = {**layer._arguments(), "residual": residual, "activation": activation}
    given.pop("k", None)
    return operator(x, **given)


def expected(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    with torch.enable_grad():
        result = call(layer, x.clone().requires_grad_(), residual)
    return result.detach()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_from_the_third_call_on_nothing_is_looked_up_again(layer: Any, shortened: list[bool], mode: Any) -> None:
    x, residual = torch.randn(3, 32), torch.randn(3, 16)
    plain, added = expected(layer, x), expected(layer, x, residual)
    for given, required in ((None, plain), (residual, added)):
        shortened.clear()
        with mode():
            results = [call(layer, x, given) for _ in range(4)]
        assert shortened[-1]
        assert all(torch.equal(each, required) for each in results)
        assert not any(each.requires_grad for each in results)


def test_wrong_arguments_are_errors_after_right_ones_too(layer: Any) -> None:
    x, residual = torch.randn(3, 32), torch.randn(3, 16)
    with torch.no_grad():
        for _ in range(3):
            call(layer, x, residual)
        with pytest.raises(ValueError, match="residual"):
            call(layer, x, torch.randn(3, 15))
        with pytest.raises((ValueError, TypeError)):
            call(layer, x.to(torch.int32))
        with pytest.raises(ValueError, match="weight"):
            call(layer, x[:, :24])
        with pytest.raises(ValueError, match="activation"):
            call(layer, x, activation="step")


def test_what_is_written_replaced_or_decided_anew_is_noticed(layer: Any, shortened: list[bool]) -> None:
    x = torch.randn(3, 32)

    def again() -> None:
        shortened.clear()
        with torch.no_grad():
            result = call(layer, x)
        assert shortened and not shortened[0]
        assert torch.equal(result, expected(layer, x))
        with torch.no_grad():
            for _ in range(3):
                call(layer, x)
        assert shortened[-1]

    again()
    with torch.no_grad():
        layer.bias.add_(1.0)
    again()
    layer.weight_scale.mul_(2.0)
    again()
    layer.bias.data = torch.randn(16)
    again()
    layer.bias = nn.Parameter(torch.randn(16))
    again()
    router.invalidate()
    again()
    with torch.no_grad():
        assert torch.equal(call(layer, x, activation="relu"), expected(layer, x).relu())


def test_modes_and_gradients_see_the_operator(layer: Any) -> None:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, 32)
    with torch.no_grad():
        for _ in range(3):
            call(layer, x)
        with Watch():
            call(layer, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert call(layer, x).dtype == torch.bfloat16
    assert f"tilewright.{layer.op_name}.default" in seen
    image = x.clone().requires_grad_()
    call(layer, image).sum().backward()
    assert torch.allclose(image.grad, layer.dequantize_weight().sum(0).expand(3, -1), rtol=1e-4, atol=1e-5)


def test_what_is_remembered_goes_with_the_weight() -> None:
    repeats = Repeats(4, lambda arguments: lambda x, residual: x, lambda args, named: {})
    weight, x = torch.randn(4, 4), torch.randn(2, 4)
    for _ in range(3):
        found = repeats.find((x, weight), {})
    assert found is not None and repeats._known.items()
    del weight
    gc.collect()
    assert not repeats._known.items()
