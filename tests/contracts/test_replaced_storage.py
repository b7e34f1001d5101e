"""What a module that has run remembers goes when its tensors do: it answers as an equal one that never ran.

Each module runs three times, until its calls are prepared or recorded. Then its tensors are changed in one of the ways
of ``changes.py``, and what was freed is overwritten with NaN before the next call.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
from tests.contracts import changes
from tests.contracts.changes import (
    COPIES,
    MODES,
    OF_MODULES,
    OF_TENSORS,
    difference,
    garbage,
    outcome,
    same,
    tensors_of,
)
from tests.contracts.convolutions import CONVOLUTIONS
from tests.contracts.layers import LAYERS, K
from tests.convert.networks import SmallResNet, settled
from tilewright.kernels.cpu import steps as conv_steps

Change = Callable[[nn.Module], None]
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
#: Half-precision biases are cast when a call is prepared.
LINEAR = {layer.name: layer for layer in LAYERS} | {
    f"{layer.name}-bfloat16": layer for layer in LAYERS if layer.bias and "-" not in layer.name
}
#: PyTorch itself cannot compute with what comes of ``p.data = q`` where p was made in inference mode and q was not.
HYBRID = "needs a PyTorch that counts writes into a tensor made in inference mode whose .data is another's"
CONVS = {f"conv-{convolution.name}": convolution for convolution in CONVOLUTIONS}


@pytest.fixture(autouse=True, scope="module")
def short_collections() -> Iterator[None]:
    """Nothing that was there before is looked at by the collections of this module, which are many."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def check(module: nn.Module, x: torch.Tensor, change: Change, call: Any = None, exact: bool = True) -> None:
    """``module``, or ``call`` that runs it, answers after ``change`` as a copy does that never ran."""
    call = module if call is None else call
    for _ in range(3):
        call(x)
    sizes = [tensor.untyped_storage().nbytes() for tensor in tensors_of(module).values()]
    change(module)
    overwritten = garbage(sizes)
    found = outcome(call, x)
    del overwritten
    expected = outcome(copy.deepcopy(module), x)
    assert same(found, expected, exact), difference(found, expected)
    for _ in range(3):
        assert same(outcome(call, x), expected, exact), "in a later call"


def changes_of(module: nn.Module, change: Callable[[torch.Tensor], None]) -> dict[str, Change]:
    """``change`` of each tensor of a module like ``module``."""
    return {name: lambda m, name=name: change(tensors_of(m)[name]) for name in tensors_of(module)}  # type: ignore[misc]


def linear(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
    return LINEAR[name].make(dtype=dtype).eval(), torch.randn(3, K, dtype=dtype)


def convolution(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return CONVS[name].make().eval(), CONVS[name].input()


# ---- layers
MADE: dict[str, Callable[[str], tuple[nn.Module, torch.Tensor]]] = {
    **dict.fromkeys(LINEAR, linear),
    **dict.fromkeys(CONVS, convolution),
}
each_layer = pytest.mark.parametrize("name", MADE)


@each_layer
@each_mode
@pytest.mark.parametrize("change", OF_TENSORS.values(), ids=list(OF_TENSORS))
def test_a_tensor_of_a_layer(name: str, change: Any, mode: Any) -> None:
    made, x = MADE[name](name)
    for tensor_change in changes_of(made, change).values():
        module = copy.deepcopy(made)
        with mode():
            check(module, x, tensor_change)


@each_layer
@each_mode
@pytest.mark.parametrize("change", OF_MODULES.values(), ids=list(OF_MODULES))
def test_a_layer(name: str, change: Any, mode: Any) -> None:
    module, x = MADE[name](name)
    if change in (changes.load_swap, changes.to_dtype) and name in CONVS and mode is torch.inference_mode:
        pytest.skip(HYBRID)
    with mode():
        check(module, x, change)


@each_layer
@each_mode
@pytest.mark.parametrize("way", COPIES.values(), ids=list(COPIES))
def test_a_copy_made_in_between_keeps_to_itself(name: str, way: Any, mode: Any) -> None:
    module, x = MADE[name](name)
    with mode():
        for _ in range(3):
            before = module(x)
        copied = way(module)
        check(module, x, changes.load_assign)
        for _ in range(3):
            assert torch.equal(copied(x), before)
        check(copied, x, changes.share)
        check(copied, x, changes.load)


# ---- models
class Block(nn.Module):
    """Of a transformer."""

    def __init__(self, width: int = 32, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.activation = nn.Linear(width, 64), nn.Linear(64, width), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        x = x + self.out(mixed)
        return x + self.down(self.activation(self.up(self.norm2(x))))


def network(recipe: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    reason = conv_steps.why_no_kernels()
    if reason:
        pytest.skip(reason)
    sample = torch.randn(8, 1, 16, 16)
    model = tw.convert_model(settled(SmallResNet()), recipe, calibration_data=[sample] if recipe == "int8" else None)
    return model, sample[:2]


def block(recipe: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return tw.convert_model(Block().eval(), recipe), torch.randn(2, 5, 32)


MODELS = {
    "network-fuse": lambda: network("fuse"),
    "network-int8": lambda: network("int8"),
    "block-int8": lambda: block("int8"),
    "block-int4": lambda: block("int4-g32"),
    "block-int8-int4": lambda: block("int8-int4-g32"),
}


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    return {}


@pytest.fixture(params=MODELS)
def model(request: Any, models: dict[str, tuple[nn.Module, torch.Tensor]]) -> tuple[nn.Module, torch.Tensor]:
    """A copy of a converted model, and an input."""
    if request.param not in models:
        models[request.param] = MODELS[request.param]()
    module, x = models[request.param]
    return copy.deepcopy(module), x


@each_mode
@pytest.mark.parametrize("change", OF_MODULES.values(), ids=list(OF_MODULES))
def test_a_model(model: tuple[nn.Module, torch.Tensor], change: Any, mode: Any) -> None:
    if change is changes.load_swap and mode is torch.inference_mode:
        pytest.skip(HYBRID)
    with mode():
        check(*model, change, exact=False)


@each_mode
@pytest.mark.parametrize("change", [changes.data, changes.swap, changes.share_and_write], ids=["data", "swap", "share"])
def test_all_tensors_of_a_model(model: tuple[nn.Module, torch.Tensor], change: Any, mode: Any) -> None:
    def all_tensors(module: nn.Module) -> None:
        for tensor in tensors_of(module).values():
            change(tensor)

    with mode():
        check(*model, all_tensors, exact=False)


@pytest.mark.slow
@each_mode
@pytest.mark.parametrize("change", OF_TENSORS.values(), ids=list(OF_TENSORS))
def test_each_tensor_of_a_model(model: tuple[nn.Module, torch.Tensor], change: Any, mode: Any) -> None:
    made, x = model
    for tensor_change in changes_of(made, change).values():
        module = copy.deepcopy(made)
        with mode():
            check(module, x, tensor_change, exact=False)


def test_a_network_is_recorded_meanwhile() -> None:
    """Or the tests above would show nothing of recordings."""
    module, x = network("fuse")
    with torch.no_grad():
        check(module, x, changes.load, exact=False)
    assert vars(module)["forward"]._replays.replays


@pytest.mark.parametrize("backend", ["eager", "tilewright"])
@pytest.mark.parametrize("name", ["int8", "int8-activation-int4-weight"])
def test_a_compiled_graph(name: str, backend: str) -> None:
    """Its calls are remembered by weight, as those of a layer are by layer."""
    module, x = linear(name)
    torch._dynamo.reset()
    options = {"options": {"inner": "eager"}} if backend == "tilewright" else {}
    call = torch.compile(module, backend=backend, **options)  # type: ignore[call-overload]
    with torch.no_grad():
        for change in (changes.load, changes.vector_to_parameters, changes.share, changes.optimizer_step):
            check(module, x, change, call)
        for change in changes_of(module, changes.data).values():
            check(module, x, change, call)
