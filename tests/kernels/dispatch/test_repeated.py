"""The shortest way to a kernel is taken for a call like one before, and never where something is not as it was."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tilewright.nn as tnn
from tilewright.commands import doctor
from tilewright.kernels.cpu import build, native
from tilewright.kernels.dispatch import layers, repeated, router

CALLS = 4


@pytest.fixture(autouse=True)
def _needs_the_module() -> None:
    reason = native.why_no_native() or repeated.why_not("_known_calls")
    if reason:
        pytest.skip(reason)


def known(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether the shortest way serves a call on ``x``."""
    return layers.repeated_call(vars(layer), x) is not None


def warm(x: torch.Tensor, **options: Any) -> Any:
    """A layer that was called with ``x`` often enough."""
    torch.manual_seed(0)
    layer = tnn.Int8Linear.from_float(nn.Linear(x.shape[-1], 16), **options).eval()
    with torch.no_grad():
        for _ in range(CALLS):
            layer(x)
        assert known(layer, x)
    return layer


def test_it_gives_what_the_kernel_gives():
    for x in (torch.randn(3, 32), torch.randn(2, 3, 32), torch.randn(32), torch.randn(300, 1024).bfloat16()):
        layer = warm(x, activation="relu")
        with torch.enable_grad():
            expected = layer(x).detach()
        with torch.no_grad():
            y = layers.repeated_call(vars(layer), x)
        assert y is not None and y.dtype == x.dtype and y.is_contiguous() and torch.equal(y, expected)


def test_other_inputs_are_none_of_its_business():
    x = torch.randn(6, 32)
    layer = warm(x)
    others = {
        "shape": torch.randn(5, 32),
        "dtype": x.double(),
        "strides": torch.randn(32, 6).t(),
        "subclass": nn.Parameter(x, requires_grad=False),
        "sign to change": torch.complex(x, x).conj().imag,
        "meta": x.to("meta"),
        "no tensor": [1, 2],
    }
    with torch.no_grad():
        for what, other in others.items():
            assert not known(layer, other), what
        assert known(layer, x.clone())


def test_whoever_looks_is_noticed():
    x = torch.randn(6, 32)
    layer = warm(x)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    assert not known(layer, x)  # gradients may be asked for
    found: list[bool] = []

    def traced(x: torch.Tensor) -> torch.Tensor:
        found.append(known(layer, x))
        return x + 1

    with torch.no_grad():
        with Watch():
            assert not known(layer, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert not known(layer, x)
        with torch.profiler.profile():
            assert not known(layer, x)
        with torch.device("cpu"):
            assert not known(layer, x)
        with torch.autograd.forward_ad.dual_level():
            assert not known(layer, x)
        torch.vmap(traced)(x.expand(2, 6, 32))
        torch.jit.trace(traced, (x,), check_trace=False)
        torch.func.jvp(traced, (x,), (x,))
        assert found and not any(found)
        assert known(layer, x)


def test_another_router_and_another_number_of_threads_are_noticed():
    x = torch.randn(64, 512)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        layer = warm(x)
        with torch.no_grad():
            torch.set_num_threads(1)
            assert not known(layer, x)
            torch.set_num_threads(2)
            assert known(layer, x)
            router.invalidate()
            assert not known(layer, x)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["weight_codes", "weight_scale", "channel_scale", "bias"])
def test_a_tensor_that_is_replaced_written_or_moved_is_noticed(name: str):
    x = torch.randn(6, 32)

    def layer() -> Any:
        return warm(x, channel_scale=torch.ones(32))

    with torch.no_grad():
        changed = layer()
        getattr(changed, name).zero_()
        assert not known(changed, x)
        changed = layer()
        tensor = getattr(changed, name)
        setattr(changed, name, type(tensor)(tensor.detach(), **({"requires_grad": False} if name == "bias" else {})))
        assert not known(changed, x)
        changed = layer()
        getattr(changed, name).data = getattr(changed, name).data.clone()
        assert not known(changed, x)
        changed = layer()
        getattr(changed, name).data = getattr(changed, name).data[:-1]
        assert not known(changed, x)
    changed = layer()
    with torch.no_grad():
        if name in ("channel_scale", "bias"):
            setattr(changed, name, None)
            assert not known(changed, x)


def test_a_tensor_that_was_not_there_is_noticed():
    x = torch.randn(6, 32)
    layer = warm(x)
    layer._buffers["channel_scale"] = torch.full((32,), 2.0)
    with torch.no_grad():
        assert not known(layer, x)
    layer = warm(x)
    layer.bias = None
    with torch.no_grad():
        for _ in range(CALLS):
            layer(x)
        assert known(layer, x)
        layer.bias = nn.Parameter(torch.ones(16))
        assert not known(layer, x)


def test_nothing_is_kept_alive():
    x = torch.randn(6, 32)
    layer = warm(x)
    gone = [weakref.ref(layer), *(weakref.ref(tensor.untyped_storage()) for tensor in (layer.weight_codes,))]
    gc.disable()
    try:
        del layer
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


def test_threads_may_call_while_tensors_are_replaced():
    x = torch.randn(6, 32)
    layer = warm(x)
    codes = [layer.weight_codes, layer.weight_codes.clone() // 2]
    with torch.no_grad():
        results = []
        for code in codes:
            layer.weight_codes = code
            results.append(layer(x))
        wrong: list[torch.Tensor] = []

        def call() -> None:
            with torch.no_grad():
                for _ in range(300):
                    y = layer(x)
                    if not any(torch.equal(y, one) for one in results):
                        wrong.append(y)

        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        for i in range(300):
            layer.weight_codes = codes[i % 2]
        for thread in threads:
            thread.join()
    assert not wrong


def test_without_the_module_layers_work_and_doctor_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    x = torch.randn(6, 32)
    expected = warm(x)
    monkeypatch.setattr(build, "EAGER", tmp_path / "_eager.abi3.so")
    try:
        native.eager.cache_clear()
        repeated.why_not.cache_clear()
        layer = tnn.Int8Linear(32, 16)
        layer.load_state_dict(expected.state_dict())
        with torch.no_grad():
            for _ in range(CALLS):
                assert torch.equal(layer(x), expected(x))
            assert not known(layer, x)
        assert any("headers of Python" in finding.found for finding in doctor.examine())
    finally:
        native.eager.cache_clear()
        repeated.why_not.cache_clear()
