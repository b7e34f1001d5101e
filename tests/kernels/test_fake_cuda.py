"""Rung 6: the CUDA branch traced without a GPU, on fake tensors that say they are on one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from bench.problems import OPS, QUANTIZERS, Shape, make_arguments
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import route
from tilewright.nn import Int4Linear, Int8ActInt4WeightLinear, Int8Linear, Int8WeightOnlyLinear

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MODULES = (Int8Linear, Int8WeightOnlyLinear, Int4Linear, Int8ActInt4WeightLinear)


def fake_on_cuda(arguments: dict) -> dict:
    """Under ``FakeTensorMode``: the same arguments, said to be on a GPU."""
    return {
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("op", OPS)
def test_operators_on_cuda_have_the_shapes_and_dtypes_of_the_definition(op: str, dtype: torch.dtype) -> None:
    arguments = make_arguments(op, Shape(5, 24, 64, dtype, group_size=32, residual=True))
    run = getattr(torch.ops.tilewright, op)
    expected = run(**arguments)
    with FakeTensorMode():
        found = run(**fake_on_cuda(arguments))
    for fake, real in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
        assert fake.device.type == "cuda"
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize("op", OPS)
def test_operators_on_cuda_are_one_node_of_a_trace(op: str) -> None:
    arguments = make_arguments(op, Shape(5, 24, 64, torch.float16, group_size=32))
    with FakeTensorMode(), torch.no_grad():
        fake = fake_on_cuda(arguments)
        x = fake.pop("x")
        graph = make_fx(lambda x: getattr(torch.ops.tilewright, op)(x, **fake))(x).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called[0] == f"tilewright.{op}.default"
    assert all("getitem" in name for name in called[1:])


@pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)
def test_modules_on_cuda_export_with_any_batch(cls: type[nn.Module]) -> None:
    """``torch.export`` of a module whose parameters and input are on a GPU that is not there."""
    module = cls.from_float(nn.Linear(64, 24))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            owner, _, last = name.rpartition(".")
            parent = module.get_submodule(owner)
            if last in parent._parameters:
                parent._parameters[last] = nn.Parameter(fake, requires_grad=False)
            else:
                parent._buffers[last] = fake
        x = torch.empty(6, 64, device="cuda")
        exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert any(name.startswith("tilewright.") for name in called)
    (output,) = [node for node in exported.graph.nodes if node.op == "output"]
    value = output.args[0][0].meta["val"]
    assert value.device.type == "cuda" and value.shape[1] == 24 and value.dtype == torch.float32
    assert not isinstance(value.shape[0], int), "the batch has become a constant"


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it publishes wheels for Linux alone"
)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("m", [1, 64, 4096])
def test_on_a_gpu_the_router_chooses_more_than_the_definition(op: str, m: int) -> None:
    """Asked without a GPU: what serves a call there is not the reference."""
    dtype = torch.int8 if op == "int8_linear_quantized" else torch.bfloat16
    n = 4096 if op in QUANTIZERS else 1024
    group = {"group_size": 128} if op.startswith("int4") else {}
    problem = Problem(op, m, n, 4096, dtype, device="cuda", capability=(9, 0), multiprocessors=132, **group)
    assert route(problem).name != "reference"
