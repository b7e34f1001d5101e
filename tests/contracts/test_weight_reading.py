"""``layer.weight`` of every drop-in layer reads as the float weight of the layer that was there."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tests.contracts.layers import K, N
from tests.contracts.weights import each_layer, input_of, made, plain_weight, stored
from tilewright.nn import ConvBnAct2d, Int4Linear, stored_weight
from tilewright.nn.float_weight import FloatWeight, FloatWeightView


# ---- reading
@each_layer
def test_it_reads_as_the_weight_of_the_layer_that_was_there(name: str) -> None:
    layer = made(name)
    expected = plain_weight(layer)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device) == (expected.shape, expected.dtype, expected.device)
    assert isinstance(weight, torch.Tensor) and not isinstance(weight, nn.Parameter)
    assert torch.equal(weight, expected)
    assert weight.is_contiguous() and weight.clone().is_contiguous()
    assert torch.equal(weight.data, expected) and torch.equal(weight.detach().float(), expected.float())


@each_layer
def test_metadata_costs_no_dequantising(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made(name)
    expected = plain_weight(layer)
    monkeypatch.setattr(type(layer), "_decoded", lambda *_: pytest.fail("dequantised"))
    weight = layer.weight
    assert weight.ndim == weight.dim() == expected.dim() and weight.numel() == expected.numel()
    assert (len(weight), weight.size(0), weight.stride()) == (len(expected), expected.size(0), expected.stride())
    assert weight.is_floating_point() and weight.element_size() == expected.element_size()
    assert weight.nbytes == expected.nbytes and weight.layout == torch.strided
    assert weight.device.type == "cpu" and weight.is_cpu and not weight.is_meta and not weight.is_cuda
    assert weight.get_device() == -1 and not weight.is_quantized and weight.is_leaf
    assert weight.requires_grad == isinstance(layer, ConvBnAct2d)
    assert not hasattr(weight, "SCB") and not hasattr(weight, "quant_state")


@each_layer
def test_operators_compute_with_it(name: str) -> None:
    layer = made(name)
    weight, expected = layer.weight, plain_weight(layer)
    rows = expected.shape[-1]
    x = torch.randn(2, rows, dtype=expected.dtype)
    results = [
        *(weight + 1, expected + 1),
        *(1 - weight, 1 - expected),
        *(weight.norm(), expected.norm()),
        *(torch.linalg.vector_norm(weight, dim=1), torch.linalg.vector_norm(expected, dim=1)),
        *(weight.to(torch.float64), expected.to(torch.float64)),
        *(weight.half(), expected.half()),
        *(torch.cat([weight, layer.weight]), torch.cat([expected, expected])),
        *(torch.stack([weight, expected]), torch.stack([expected, expected])),
        *(weight.flatten(1) @ weight.flatten(1).T, expected.flatten(1) @ expected.flatten(1).T),
        *(x @ weight.flatten(0, -2).t(), x @ expected.flatten(0, -2).t()),
        *(F.linear(x, weight.flatten(0, -2)), F.linear(x, expected.flatten(0, -2))),
        *(torch.zeros_like(weight), torch.zeros_like(expected)),
        *(weight.max(dim=0).values, expected.max(dim=0).values),
        *(torch.einsum("a...,a...->a...", weight, weight), expected * expected),
    ]
    for ours, theirs in zip(results[::2], results[1::2], strict=True):
        assert type(ours) is torch.Tensor
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.tensor(weight.tolist(), dtype=expected.dtype), expected)


@each_layer
def test_views_are_views(name: str) -> None:
    layer = made(name)
    weight, expected = layer.weight, plain_weight(layer)
    views: list[Callable[[torch.Tensor], torch.Tensor]] = [
        *(lambda w: w[0], lambda w: w[1:3], lambda w: w.data[..., 1:], lambda w: w.transpose(0, 1), lambda w: w.mT),
        *(lambda w: w.view(-1), lambda w: w.flatten(), lambda w: w.unbind(0)[1], lambda w: w.chunk(2)[1]),
        *(lambda w: list(w)[2], lambda w: w.detach().unsqueeze(0), lambda w: w.movedim(0, -1), lambda w: w[:, None]),
        lambda w: w.reshape(w.shape[0], -1)[1, 2:],
    ]
    for view in views:
        assert isinstance(view(weight), FloatWeightView)
        assert torch.equal(view(weight), view(expected))
        assert torch.equal(view(weight) + view(layer.weight), view(expected) + view(expected))


@pytest.mark.parametrize("name", ["int8", "int4", "conv-float"])
def test_of_all_weights_the_last_alone_is_kept_and_not_for_long(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, other = made(name), made(name)
    calls, decoded = [0], type(layer)._decoded

    def counted(self: Any, held: Any) -> torch.Tensor:
        calls[0] += 1
        return decoded(self, held)

    monkeypatch.setattr(type(layer), "_decoded", counted)
    with torch.no_grad():
        weight, others = layer.weight, other.weight
        for row in weight:
            row.sum()
        assert calls == [1]
        others.sum()
        assert weight._stored._made is None, "that of another layer took its place"
        others.sum()
        assert calls == [2]
        (other.weight_codes if name == "int8" else next(iter(other._held_weight().values()))).add_(1)
        others.sum()
        assert calls == [3], "what is stored was written to"
        del others
        gc.collect()
        assert stored_weight._last() is None


# ---- copies
@each_layer
def test_copies_are_plain_tensors(name: str, tmp_path: Path) -> None:
    layer = made(name)
    weight, expected = layer.weight, plain_weight(layer)
    buffer = io.BytesIO()
    torch.save({"all": weight, "part": weight[1:]}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)
    save_file({"weight": layer.weight, "other": made(name).weight}, tmp_path / "weight.safetensors")
    for copied in (
        *(copy.deepcopy(weight), copy.copy(weight), weight.clone(), loaded["all"]),
        pickle.loads(pickle.dumps(weight)),  # noqa: S301 (our own bytes)
        load_file(tmp_path / "weight.safetensors")["weight"],
    ):
        assert type(copied) is torch.Tensor and torch.equal(copied, expected)
    assert torch.equal(loaded["part"], expected[1:])
    assert torch.equal(copy.deepcopy(weight[1:]), expected[1:])
    with torch.no_grad():
        copy.deepcopy(weight).zero_()
    assert torch.equal(layer.weight, expected)


def test_numpy_reads_but_does_not_write() -> None:
    weight, expected = made("int8").weight, plain_weight(made("int8")).numpy()
    for array in (weight.numpy(), np.asarray(weight), weight.data.numpy(), np.asarray(weight[1:])):
        assert np.array_equal(array, expected[-len(array) :])
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_it_goes_into_a_plain_layer() -> None:
    layer, linear = made("int8"), nn.Linear(K, N)
    linear.weight.data = layer.weight.data
    assert type(linear.weight) is nn.Parameter and torch.equal(linear.weight, plain_weight(layer))
    before = stored(layer)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight.copy_(layer.weight)
    assert torch.equal(linear.weight, plain_weight(layer))
    linear.weight = nn.Parameter(layer.weight.clone())
    linear.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    assert torch.equal(linear.weight, plain_weight(layer))
    assert all(torch.equal(value, before[name]) for name, value in stored(layer).items())
    with pytest.raises(RuntimeError, match="incompatible tensor type"):  # and not memory that is not there
        linear.weight.data = layer.weight


# ---- the module around it
@each_layer
def test_it_is_no_parameter_and_no_buffer(name: str) -> None:
    layer = made(name)
    assert not {"weight"} & {*dict(layer.named_parameters()), *dict(layer.named_buffers()), *layer.state_dict()}
    assert hasattr(layer, "weight") and "weight" not in vars(layer)
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.weight.mul_(2)
    assert not torch.equal(copied.weight, layer.weight)
    assert torch.equal(pickle.loads(pickle.dumps(layer)).weight, layer.weight)  # noqa: S301 (our own bytes)


@each_layer
def test_it_follows_the_module(name: str) -> None:
    layer = made(name)
    held = layer.weight
    expected = plain_weight(layer)
    layer.to(torch.float16)
    assert layer.weight.dtype == torch.float16 and torch.equal(layer.weight, plain_weight(layer))
    layer.to(expected.dtype)
    layer.share_memory()
    assert layer.weight.is_shared()
    torch.testing.assert_close(layer.weight.clone(), expected, rtol=2e-3, atol=1e-4)
    layer.to("meta")
    assert layer.weight.is_meta and layer.weight.shape == expected.shape
    nn.init.zeros_(layer.weight)
    torch.testing.assert_close(held.clone(), expected, rtol=2e-3, atol=1e-4)


@each_layer
def test_a_functional_call_leaves_the_layer_as_it_was(name: str) -> None:
    """Under the names of the plain model too."""
    layer = made(name)
    x, weight, before = input_of(layer), plain_weight(layer), stored(layer)
    for _ in range(3):
        y = layer(x)
    with torch.no_grad():
        changed = torch.func.functional_call(layer, {"weight": 2 * weight}, x)
    assert not torch.equal(changed, y)
    assert all(torch.equal(value, before[each]) for each, value in stored(layer).items())
    assert torch.equal(layer(x), y)
    own = {each: value * 2 if value.is_floating_point() else value for each, value in before.items()}
    assert not torch.equal(torch.func.functional_call(layer, own, x), y)
    assert torch.equal(layer(x), y)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_fsdp_shards_what_is_there(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(made("int8"), nn.Linear(N, N), made("int4"))
    model[2] = Int4Linear.from_float(nn.Linear(N, N), compute_dtype=None)
    x = torch.randn(3, K)
    expected, weight = model(x), plain_weight(model[0])
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    torch.testing.assert_close(model(x), expected)
    assert {name for name, _ in model.named_parameters()} == {"0.bias", "1.weight", "1.bias", "2.bias"}
    assert type(model[0].weight) is FloatWeight and torch.equal(model[0].weight, weight)


# ---- graphs
class Reads(nn.Module):
    """Reads the weight of its layer instead of calling it."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.layer.weight
        x = x.to(weight.dtype)
        rows = F.linear(x, weight.flatten(0, -2))
        return rows * weight.norm() + weight[0].sum()


@pytest.mark.parametrize(
    "name",
    [
        *("int8", "int8-smooth-no_bias", "int8-bfloat16", "int8-transposed", "int4", "int4-asymmetric-float32"),
        *("sparse24", "sparse24-int8", "sparse24-int4-asymmetric-float32"),
        *("conv-float", "conv-float-1d", "conv-sparse24", "conv-int8-1d-residual"),
    ],
)
@torch.no_grad()
def test_a_parent_that_reads_it_compiles_and_exports_whole(name: str) -> None:
    model = Reads(made(name))
    x = torch.randn(2, plain_weight(model.layer).shape[-1])
    expected = model(x)
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if expected.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, **tolerance)
    for strict in (False, True):
        exported = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), expected, **tolerance)
    model.layer.weight.mul_(2)
    torch.testing.assert_close(compiled(x), model(x), **tolerance)
