"""Networks that replay as C calls are one operator of a compiled graph, and what they were in every other respect."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from bench.tables.compile_modes import Residual
from tests.backend.networks import settled
from tests.convert.networks import programs_of


class Graphs:
    """A backend that keeps what it is given, and runs it as it is."""

    def __init__(self) -> None:
        self.operators: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.operators.append(
            [str(node.target).removesuffix(".default") for node in graph.graph.nodes if node.op == "call_function"]
        )
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def convert(model: nn.Module, recipe: str) -> nn.Module:
    data = [torch.randn(2, 3, 32, 32)] if recipe == "int8" else None
    return tw.convert_model(settled(model), recipe, calibration_data=data)


@pytest.mark.parametrize("recipe", ["fuse", "int8"])
def test_a_converted_network_is_one_operator_for_all_batches(recipe: str) -> None:
    model, graphs = convert(Residual(), recipe), Graphs()
    run = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.inference_mode():
        for batch in (2, 3, 5, 3, 5, 5):
            x = torch.randn(batch, 3, 32, 32)
            found, expected = run(x), model(x)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert found.stride() == expected.stride()
    assert graphs.operators == [["tilewright.region"]] * 2


def test_the_operator_keeps_the_promises_of_operators() -> None:
    model = convert(Residual(), "fuse")
    (program,) = programs_of(model).values()
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32)
        torch.library.opcheck(torch.ops.tilewright.region.default, ([x], program._region_name))


def test_gradients_autocast_and_export_see_the_single_operators() -> None:
    model, graphs, x = convert(Residual(), "fuse"), Graphs(), torch.randn(2, 3, 32, 32)
    run = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert run(x).dtype == torch.bfloat16
    image = x.clone().requires_grad_()
    run(image).sum().backward()
    assert image.grad is not None
    assert len(graphs.operators) == 2
    assert all("tilewright.region" not in names for names in graphs.operators)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
    assert "tilewright.region" not in exported.graph_module.code


def test_weights_hooks_and_layers_that_change_later_are_noticed() -> None:
    model = convert(Residual(), "fuse")
    run, x = torch.compile(model, backend="aot_eager"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for _ in range(4):
            before = run(x)
        model.stem.weight.mul_(2.0)
        torch.testing.assert_close(run(x), model(x))
        assert not torch.allclose(run(x), before)
        handle = model.conv.register_forward_hook(lambda module, args, result: result * 0.5)
        torch.testing.assert_close(run(x), model(x))
        handle.remove()
        model.head = nn.Linear(16, 10)
        torch.testing.assert_close(run(x), model(x))
        twin = copy.deepcopy(model)
        twin.stem.weight.mul_(0.5)
        torch.testing.assert_close(torch.compile(twin, backend="aot_eager")(x), before, rtol=1, atol=1e9)
        assert not torch.allclose(twin(x), model(x))


def test_a_network_with_an_operator_without_a_kernel_is_compiled_piece_by_piece() -> None:
    class Softmax(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).softmax(-1)

    graphs, x = Graphs(), torch.randn(2, 3, 32, 32)
    model = convert(Softmax(), "fuse")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=graphs, fullgraph=True)(x), model(x))
    assert "tilewright.conv2d_fused" in graphs.operators[0]


def test_a_program_goes_with_its_model() -> None:
    model = convert(Residual(), "fuse")
    (program,) = programs_of(model).values()
    name, gone = program._region_name, weakref.ref(program)
    del program, model
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="is gone"):
        torch.ops.tilewright.region([torch.randn(1, 3, 8, 8)], name)
