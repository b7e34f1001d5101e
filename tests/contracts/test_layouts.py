"""Inputs that are not one dense tensor: nested ones go row by row, as through ``nn.Linear``; others are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.contracts.layers import K, Layer, N, each_layer
from tilewright.convert import convert_model
from tilewright.nn import ConvBnAct2d

LAYOUTS = [torch.jagged, torch.strided]


def parts(*leading: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, *leading, K, generator=generator) for rows in (3, 5, 1)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@each_layer
def test_nested_rows(layer: Layer, layout: torch.layout) -> None:
    module, rows = layer.make(), parts()
    with torch.no_grad():
        expected = [module(part) for part in rows]
        for _ in range(3):
            y = module(torch.nested.nested_tensor(rows, layout=layout))
            assert y.is_nested and y.layout == layout
            for got, part in zip(y.unbind(), expected, strict=True):
                torch.testing.assert_close(got, part)


@each_layer
def test_a_jagged_result_has_the_offsets_of_its_input(layer: Layer) -> None:
    module = layer.make()
    x = torch.nested.nested_tensor(parts(), layout=torch.jagged)
    with torch.no_grad():
        y = module(x)
        assert y.offsets() is x.offsets()
        torch.testing.assert_close(module(x, residual=y).values(), module(x.values(), residual=y.values()))
        heads = torch.nested.nested_tensor(parts(2), layout=torch.jagged)
        torch.testing.assert_close(module(heads.transpose(1, 2)).transpose(1, 2).values(), module(heads.values()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@each_layer
def test_gradients_of_nested_rows(layer: Layer, layout: torch.layout) -> None:
    module = layer.make()
    dense = [part.requires_grad_() for part in parts()]
    nested = [part.detach().requires_grad_() for part in dense]
    sum(module(part).square().sum() for part in dense).backward()
    y = module(torch.nested.as_nested_tensor(nested, layout=layout))
    sum(part.square().sum() for part in y.unbind()).backward()
    for got, expected in zip(nested, dense, strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_a_chain_of_layers_keeps_the_nesting() -> None:
    torch.manual_seed(0)
    model = convert_model(nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K)).eval(), "int8")
    x = torch.nested.nested_tensor(parts(), layout=torch.jagged)
    with torch.no_grad():
        torch.testing.assert_close((x + model(x)).values(), x.values() + model(x.values()))


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
@each_layer
def test_sparse_rows_are_refused(layer: Layer, layout: str) -> None:
    module, x = layer.make(), torch.randn(4, K)
    module.layer_name = "encoder.0"
    given = x.to_sparse() if layout == "sparse_coo" else x.to_sparse_csr()
    with pytest.raises(TypeError, match=rf"'encoder\.0' takes dense input, not torch\.{layout}: give it x\.to_dense"):
        module(given)


def test_sparse_images_are_refused() -> None:
    module = ConvBnAct2d.from_float(nn.Conv2d(3, 4, 3))
    with pytest.raises(TypeError, match=r"ConvBnAct2d takes dense input, not torch\.sparse_coo"):
        module(torch.randn(1, 3, 5, 5).to_sparse())


@each_layer
def test_scripting_is_refused_and_tracing_works(layer: Layer) -> None:
    model, x = nn.Sequential(layer.make(), nn.ReLU()).eval(), torch.randn(4, K)
    with pytest.raises(TypeError, match=r"cannot be scripted: use torch\.export\.export or torch\.jit\.trace"):
        torch.jit.script(model)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(torch.ones(7, K)), model(torch.ones(7, K)))


@pytest.mark.filterwarnings("ignore")
def test_a_network_is_traced() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    converted = convert_model(model, "fuse")
    with pytest.raises(TypeError, match="cannot be scripted"):
        torch.jit.script(converted)
    with torch.no_grad():
        traced = torch.jit.trace(converted, torch.randn(1, 3, 5, 5))
        torch.testing.assert_close(traced(torch.ones(2, 3, 7, 7)), model(torch.ones(2, 3, 7, 7)))
