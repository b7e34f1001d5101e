"""Converted models under every mode of ``torch.compile``: graphs, compilations as shapes change, agreement with eager.

    python -m bench.tables.compile_modes [--write]

--write puts the table into docs/torch_compile.md. The models are small and their weights random: this is about what is
captured, not about speed. Every model is compiled with ``fullgraph=True``, where a graph break is an error, and then
called with four batch sizes (and sequence lengths, where it has any).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tilewright as tw

PAGE = Path(__file__).parents[2] / "docs" / "torch_compile.md"
BEGIN, END = "<!-- modes: begin -->", "<!-- modes: end -->"

#: Arguments of ``torch.compile``.
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
    'backend="tilewright"': {"backend": "tilewright"},
}
#: How many times a model may be compiled: for the first shapes, and once for all others.
MOST_COMPILATIONS = 2
#: Of the largest value of the result. Inductor reorders sums, and an int8 activation may round the other way.
TOLERANCE = 0.02


def bert() -> nn.Module:
    """An encoder of transformers, one layer."""
    import transformers as hf

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.BertModel(hf.BertConfig(**sizes, vocab_size=128), add_pooling_layer=False)


def llama() -> nn.Module:
    """A decoder of transformers, one layer."""
    import transformers as hf

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.LlamaModel(hf.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=128))


class Residual(nn.Module):
    """Two convolutions around a shortcut, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W] -> [N, 10]."""
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.norm2(self.conv(x)) + x)
        return self.head(self.pool(x).flatten(1))


def _text(batch: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 128, (batch, 8 + 4 * batch))}


def _images(batch: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(batch, 3, 32, 32)}


Inputs = Callable[[int], dict[str, torch.Tensor]]
#: (architecture, recipe, inputs for a batch size)
MODELS: dict[str, tuple[Callable[[], nn.Module], str, Inputs]] = {
    "BERT, int8": (bert, "int8", _text),
    "BERT, int4": (bert, "int4-g32", _text),
    "Llama, int8 x int4": (llama, "int8-int4-g32", _text),
    "ResNet, static int8": (Residual, "int8", _images),
}


def cell(name: str, mode: str) -> str:
    """What happens to one model in one mode. Raises AssertionError if it is not what this table promises."""
    make, recipe, inputs = MODELS[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    data = [_images(4)] if make is Residual else None
    model = tw.convert_model(make().eval(), recipe, calibration_data=data)
    compiled = torch.compile(model, fullgraph=True, **MODES[mode])
    largest = 0.0
    with torch.inference_mode():
        for batch in (2, 3, 5, 4):
            given = inputs(batch)
            found, expected = _tensor(compiled(**given)), _tensor(model(**given))
            error = (found - expected).abs().max() / expected.abs().max()
            largest = max(largest, error.item())
    counters = torch._dynamo.utils.counters
    compilations, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    if breaks or not 1 <= compilations <= MOST_COMPILATIONS or not largest <= TOLERANCE:
        raise AssertionError(f"{name}, {mode}: {breaks} breaks, {compilations} compilations, error {largest:.2g}")
    return f"whole graph, compiled {compilations} times, agrees"


def _tensor(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def table(cells: dict[tuple[str, str], str]) -> str:
    """As Markdown."""
    lines = ["| model | " + " | ".join(f"`{mode}`" for mode in MODES) + " |", "|---" * (1 + len(MODES)) + "|"]
    lines += [f"| {name} | " + " | ".join(cells[name, mode] for mode in MODES) + " |" for name in MODELS]
    return "\n".join(lines)


def main() -> None:
    """Run every cell and print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    options = parser.parse_args()
    text = table({(name, mode): cell(name, mode) for name in MODELS for mode in MODES})
    if not options.write:
        print(text)
        return
    page = PAGE.read_text(encoding="utf-8")
    framed = f"{BEGIN}\n\n{text}\n\n{END}"
    PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: framed, page, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
