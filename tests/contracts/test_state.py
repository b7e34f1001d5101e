"""Saving, loading, copying, casting and moving a quantised module."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.contracts.layers import LAYERS, K, Layer, N, each_layer
from tilewright.nn import Int8Linear, QuantizedLinear

CANONICAL = {
    "weight_codes": ({torch.int8}, 2),
    "weight_scale": ({torch.float32, torch.bfloat16, torch.float16}, None),
    "weight_packed": ({torch.int32}, 2),
    "weight_values": ({torch.float32, torch.bfloat16, torch.int8, torch.int32}, 2),
    "weight_meta": ({torch.uint8}, 2),
    "weight_zero": ({torch.int32}, 2),
    "input_scale": ({torch.float32}, 0),
    "channel_scale": ({torch.float32}, 1),
    "bias": ({torch.float32}, 1),
}


def same(a: nn.Module, b: nn.Module) -> None:
    """Two modules hold the same bits and compute the same."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name
    x = torch.randn(5, K)
    assert torch.equal(a(x), b(x))


def rebuilt(module: QuantizedLinear, device: str) -> QuantizedLinear:
    """Built anew from its ``config`` as JSON would bring it back."""
    return type(module)(**json.loads(json.dumps(module.config())), device=device)


@each_layer
def test_the_state_dict_holds_plain_canonical_tensors(layer: Layer) -> None:
    module = layer.make()
    state = module.state_dict()
    for name, value in state.items():
        dtypes, dims = CANONICAL[name]
        assert type(value) is torch.Tensor
        assert value.dtype in dtypes
        assert dims is None or value.dim() == dims
        assert value.is_contiguous()
    assert ("bias" in state) == layer.bias
    assert ("channel_scale" in state) == layer.smooth
    assert ("weight_zero" in state) == (layer.options.get("symmetric") is False)
    weights = {"weight_values", "weight_meta"} if "weight_values" in state else {"weight_scale"}
    assert weights <= state.keys()
    assert len(state.keys() & {"weight_codes", "weight_packed", "weight_values"}) == 1
    module(torch.randn(3, K))
    assert module.state_dict().keys() == state.keys(), "a forward added to the state"


@each_layer
def test_safetensors_round_trip(layer: Layer, tmp_path: Path) -> None:
    module = layer.make()
    save_file(module.state_dict(), tmp_path / "layer.safetensors")
    other = layer.make()
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
    same(module, other)


@each_layer
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_loading_into_a_module_that_has_run(layer: Layer, assign: bool) -> None:
    """What was repacked for the old weight must not serve the new one."""
    module, other = layer.make(), layer.make()
    x = torch.randn(5, K)
    before = other(x)
    other.load_state_dict(module.state_dict(), strict=True, assign=assign)
    assert not torch.equal(other(x), before)
    same(module, other)


@each_layer
def test_loading_into_an_inference_module_that_has_run(layer: Layer) -> None:
    module, x = layer.make(), torch.randn(5, K)
    with torch.inference_mode():
        other = layer.make()
        other(x)
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(x), module(x))


@each_layer
def test_changing_one_scale_in_place_changes_the_output(layer: Layer) -> None:
    module, x = layer.make(), torch.randn(5, K)
    module.bias = None
    before = module(x)
    (module.weight_scale if hasattr(module, "weight_scale") else module.weight_values).mul_(2)
    torch.testing.assert_close(module(x), before * 2, rtol=1e-5, atol=1e-5)


@each_layer
def test_built_on_the_meta_device_and_filled(layer: Layer) -> None:
    module = layer.make()
    empty = rebuilt(module, "meta")
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    empty.load_state_dict(module.state_dict(), strict=True, assign=True)
    same(module, empty)
    assert empty.config() == module.config()


@each_layer
def test_built_empty_and_filled(layer: Layer) -> None:
    module = layer.make()
    empty = rebuilt(module, "cpu")
    empty.load_state_dict(module.state_dict(), strict=True)
    same(module, empty)


@each_layer
def test_moved_to_the_meta_device_and_back_by_to_empty(layer: Layer) -> None:
    module = layer.make()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    meta = copy.deepcopy(module).to("meta")
    assert meta.device.type == "meta"
    assert meta(torch.randn(5, K, device="meta")).shape == (5, N)
    filled = meta.to_empty(device="cpu")
    filled.load_state_dict(state)
    same(module, filled)


@each_layer
def test_copies(layer: Layer) -> None:
    module = layer.make()
    module(torch.randn(3, K))
    same(module, copy.deepcopy(module))
    same(module, pickle.loads(pickle.dumps(module)))  # noqa: S301 (what this test has just pickled)
    twin = copy.deepcopy(module)
    name = "weight_scale" if hasattr(twin, "weight_scale") else "weight_values"
    twin.get_buffer(name).mul_(3)
    assert not torch.equal(twin.get_buffer(name), module.get_buffer(name))


@each_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casting_leaves_scales_as_they_are(layer: Layer, dtype: torch.dtype) -> None:
    module = layer.make()
    before = {name: value.clone() for name, value in module.named_buffers()}
    cast = {
        torch.float16: module.half,
        torch.bfloat16: module.bfloat16,
        torch.float64: lambda: module.to(torch.float64),
    }[dtype]()
    assert cast is module
    for name, value in module.named_buffers():
        assert value.dtype == before[name].dtype, name
        assert torch.equal(value, before[name]), name
    assert module.bias is None or module.bias.dtype == dtype
    assert module.dtype == dtype
    assert module(torch.randn(3, K).to(dtype)).dtype == dtype
    assert module(torch.randn(3, K)).dtype == torch.float32, "the output follows the input"
    assert module.to_float().weight.dtype == dtype
    same(module.float(), module)
    assert module.dtype == torch.float32


@each_layer
def test_casting_there_and_back_loses_no_bit(layer: Layer) -> None:
    """But for the bias, which is an ordinary parameter."""
    module = layer.make()
    module.bias = None
    twin = copy.deepcopy(module)
    same(module.half().bfloat16().double().float(), twin)


@each_layer
def test_a_float_state_dict_is_refused(layer: Layer) -> None:
    """``copy_`` would truncate a float weight to integers without a word."""
    module = layer.make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"must be torch.int8, not torch.float32.*Int8|Unexpected key.*weight"):
        module.load_state_dict(layer.linear().state_dict())
    integers = [name for name, value in before.items() if not value.is_floating_point()]
    assert integers
    for name in integers:
        bad = {**before, name: before[name].float()}
        with pytest.raises(RuntimeError, match=f"{name} must be torch.u?int.*not torch.float32"):
            module.load_state_dict(bad)
        with pytest.raises(RuntimeError, match=f"{name} must be torch.u?int.*not torch.float32"):
            module.load_state_dict(bad, assign=True)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items() if name != "bias")


@each_layer
def test_a_state_dict_that_lacks_a_tensor_is_refused(layer: Layer) -> None:
    module = layer.make()
    for name in module.state_dict():
        short = {key: value for key, value in module.state_dict().items() if key != name}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            layer.make().load_state_dict(short)


@each_layer
def test_a_state_dict_of_another_size_is_refused(layer: Layer) -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.make().load_state_dict(layer.make(k=K + 32).state_dict())


def test_inside_a_model_the_names_have_their_prefix() -> None:
    int8, int4 = (next(layer for layer in LAYERS if layer.name == name) for name in ("int8", "int4"))
    model = nn.Sequential(int8.make(), nn.ReLU(), int4.make(k=N))
    assert set(model.state_dict()) == {
        *("0.weight_codes", "0.weight_scale", "0.bias"),
        *("2.weight_packed", "2.weight_scale", "2.bias"),
    }
    state = {name: value for name, value in model.state_dict().items() if name != "0.weight_codes"}
    with pytest.raises(RuntimeError, match=r"0\.weight must be torch\.int8.*not of a Int8Linear"):
        model.load_state_dict({**state, "0.weight": torch.ones(N, K)})


def test_construction_asks_for_no_memory_on_the_meta_device() -> None:
    huge = Int8Linear(1 << 20, 1 << 20, device="meta")
    assert huge.weight_bytes() == (1 << 40) + 4 * (1 << 20)
