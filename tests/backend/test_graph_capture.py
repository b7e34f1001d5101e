"""What CUDA graphs ask of a kernel's launcher, seen without a GPU.

Each Triton implementation runs on fake CUDA tensors, with launches noted instead of made. A value of a tensor that was
read on the host, which would wait for the device and break a capture, is an error there. The second call must launch
and allocate exactly what the first did: nothing is tuned, repacked or grown in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.problems import OPS, SPARSE, Shape, make_arguments
from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch import problem as problems
from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats import sparse24

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")
_DENSE = "unpacked once, then dense"
#: Who is to be seen at work, by capability, of operators that several kernels of ours serve.
SERVED = {
    (8, 0): {
        ("sparse24_linear", 1): "Triton, mma.sp",
        ("sparse24_int8_linear", 1): "Triton, mma.sp",
        ("sparse24_int4_linear", 1): "Triton, unpacked in registers",
        **{(op, 64): "Triton, unpacked in registers" for op in SPARSE},
        **{(op, 512): _DENSE for op in SPARSE},
    },
    (9, 0): {
        ("sparse24_linear", 1): "Triton, mma.sp",
        ("sparse24_int8_linear", 1): "Triton, mma.sp",
        ("sparse24_int4_linear", 1): _DENSE,
        **{(op, m): _DENSE for op in SPARSE for m in (64, 512)},
        ("int8_weight_only_linear", 512): "Triton, dequantise and multiply",
    },
}
#: Problems that cuBLAS alone multiplies.
BY_LIBRARY = ("sparse24_linear", _DENSE)


class _Operators(TorchDispatchMode):
    """Notes every operator of PyTorch that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _subscript(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """``tensor[index]`` by operators alone, for ``launches``."""
    required = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [one for one in required if not isinstance(one, torch.Tensor)]:
        place = next(i for i, one in enumerate(required) if one is Ellipsis)
        missing = tensor.dim() - sum(one is not None and one is not Ellipsis for one in required)
        required[place : place + 1] = [slice(None)] * missing
    aten, dim, tensors = torch.ops.aten, 0, {}
    for one in required:
        if one is None:
            tensor, dim = aten.unsqueeze(tensor, dim), dim + 1
        elif isinstance(one, int):
            tensor = aten.select(tensor, dim, one)
        elif isinstance(one, slice):
            tensor, dim = aten.slice(tensor, dim, one.start, one.stop, one.step or 1), dim + 1
        else:
            tensors[dim], dim = one, dim + 1
    return aten.index(tensor, [tensors.get(i) for i in range(dim)]) if tensors else tensor


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[int, ...], int, int]]]:
    noted: list[tuple[str, tuple[int, ...], int, int]] = []

    def note(self: Launch) -> None:
        noted.append((self.kernel.fn.__name__, self.grid, self.num_warps, self.num_stages))

    monkeypatch.setattr(Launch, "run", note)
    # The address of a fake tensor: aligned, and its own.
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 256 * id(self))
    # Python's own bindings of these choose the tensor's device before they dispatch, which needs a build with CUDA.
    monkeypatch.setattr(torch.Tensor, "__getitem__", _subscript)
    monkeypatch.setattr(torch.Tensor, "__setitem__", lambda self, index, value: _subscript(self, index).fill_(value))
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self, **options: torch.ops.aten.contiguous(self, **options))
    # Places of 2:4 weights are checked once, when the first call reorders them: fake ones hold nothing to check.
    monkeypatch.setattr(sparse24, "why_bad_meta", lambda meta, k: None)
    return noted


@pytest.mark.parametrize("capability", SERVED)
@pytest.mark.parametrize("m", [1, 64, 512])
@pytest.mark.parametrize("op", OPS)
def test_a_second_call_launches_the_same_without_asking_the_device(
    op: str, m: int, capability: tuple[int, int], launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = {"device": "cuda", "capability": capability, "multiprocessors": 132}
    monkeypatch.setitem(problems._device_facts, torch.device("cuda", 0), chip)
    # 2:4 pays for large weights alone.
    size, group = ((1024, 1024), 128) if op in SPARSE else ((128, 256), 32)
    arguments = make_arguments(op, Shape(m, *size, torch.float16, group_size=group, residual=True))
    facts: dict[str, Any] = {}
    if "int4" in op:
        symmetric = arguments["weight_zero"] is None
        facts = {"group_size": group, "symmetric": symmetric, "scale_dtype": torch.float16}
    x = arguments["x"]
    chosen = router.route(Problem(op, m, *size, x.dtype, **facts, **chip))
    assert chosen.name == SERVED[capability].get((op, m), chosen.name) != "reference"
    seen: list[tuple[list[str], list[Any]]] = []
    with FakeTensorMode():
        fake = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")
            if isinstance(value, torch.Tensor)
            else value
            for name, value in arguments.items()
        }
        for _ in range(3):
            launches.clear()
            with _Operators() as operators:
                chosen.implementation.function(**fake)
            seen.append((operators.names, list(launches)))
    assert launches or (op, chosen.name) == BY_LIBRARY
    assert seen[1] == seen[2]
    waiting = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.item.default"}
    assert not waiting & {name for names, _ in seen for name in names}
