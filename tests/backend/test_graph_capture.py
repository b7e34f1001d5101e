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

from bench.problems import FOLDERS, SPARSE, Shape, make_arguments
from tilewright.aot.launch import Launch
from tilewright.kernels import problem as problems
from tilewright.kernels import router
from tilewright.kernels.formats import int4
from tilewright.kernels.problem import Problem

pytest.importorskip("triton")
FACTS = {"device": "cuda", "capability": (9, 0), "multiprocessors": 132}


class _Operators(TorchDispatchMode):
    """Notes every operator of PyTorch that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[int, ...], int, int]]]:
    noted: list[tuple[str, tuple[int, ...], int, int]] = []

    def note(self: Launch) -> None:
        noted.append((self.kernel.fn.__name__, self.grid, self.num_warps, self.num_stages))

    monkeypatch.setattr(Launch, "run", note)
    # The address of a fake tensor: aligned, and its own.
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 256 * id(self))
    # Fake tensors cannot shift bits on a device that is not there. Only the first call does, to reorder weights.
    monkeypatch.setattr(int4, "unpack", lambda q, columns: q.new_empty(len(q), columns, dtype=torch.uint8))
    monkeypatch.setitem(problems._device_facts, torch.device("cuda", 0), FACTS)
    return noted


@pytest.mark.parametrize("m", [1, 64, 512])
@pytest.mark.parametrize("op", [op for op in FOLDERS if op not in SPARSE])  # fake tensors cannot reorder 2:4 weights
def test_a_second_call_launches_the_same_without_asking_the_device(op: str, m: int, launches: list[Any]) -> None:
    arguments = make_arguments(op, Shape(m, 128, 256, torch.float16, group_size=32, residual=True))
    facts: dict[str, Any] = {}
    if op.startswith("int4"):
        facts = {"group_size": 32, "symmetric": arguments["weight_zero"] is None, "scale_dtype": torch.float16}
    x = arguments["x"]
    chosen = router.route(Problem(op, m, 128, 256, x.dtype, **facts, **FACTS))
    assert chosen.name != "reference"
    if "multiply" in chosen.name:
        pytest.skip("it multiplies with cuBLAS into a slice, which fake tensors cannot without a CUDA build")
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
    assert launches
    assert seen[1] == seen[2]
    waiting = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.item.default"}
    assert not waiting & {name for names, _ in seen for name in names}
