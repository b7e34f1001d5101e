"""A converted transformer under ``torch.compile``: one graph, the same output, no recompilation with every batch."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

import tilewright as tw

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


@pytest.mark.parametrize("recipe", ["int8", "int4-g32"])
def test_full_graph_and_changing_batches(llama: Any, recipe: str) -> None:
    torch._dynamo.reset()
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model = tw.convert_model(llama, recipe)
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    with torch.no_grad():
        for batch in (2, 3, 5, 4):
            ids = torch.randint(0, 256, (batch, 16), generator=torch.Generator().manual_seed(batch))
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert graphs <= 2


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler, and there is none"
)
def test_inductor_gives_the_same_output(llama: Any) -> None:
    torch._dynamo.reset()
    model = tw.convert_model(llama, "int8")
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5
        )
