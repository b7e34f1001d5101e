"""The compiled path on this CPU: a BERT-base and a ResNet-50, converted and compiled, beside what others make of them.

    python -m bench.tables.torch_compile [--models bert-base resnet50] [--batches 1 8] [--tokens 32] [--csv FILE]

Random weights; ResNet-50 with 224 x 224 pixels. All variants of a model are timed in turn in one process, and the
medians compared. torchao is needed for its column only; it is no dependency. What is compiled must agree with the same
model in eager mode; how far int8 is from float32 is printed, and means little for random weights.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tilewright as tw
from bench.result_files import RESULTS, write_measured
from bench.tables.conv import model as image_network
from bench.timer import interleaved
from tilewright.backend import tilewright as backend

THREADS = 2
#: Largest relative error of a variant against what it was made from: in float, and where int8 steps may round the other
#: way.
LARGEST_ERRORS = {"float": 1e-3, "int8": 0.02}


def bert_base() -> nn.Module:
    """A BERT of the size of bert-base, random weights."""
    import transformers as hf

    torch.manual_seed(0)

    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = hf.BertModel(hf.BertConfig(), add_pooling_layer=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            """Token ids [N, L] -> hidden states [N, L, 768]."""
            return self.bert(ids).last_hidden_state

    return States().eval()


def torchao_int8(model: nn.Module) -> nn.Module:
    """torchao's int8 weights with dynamically quantised activations."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def variants(name: str, tokens: int) -> tuple[nn.Module, dict[str, Callable[..., Any]], Callable[[int], torch.Tensor]]:
    """The float32 model, the contestants, and inputs for a batch size. tokens: in a sequence of text."""
    torch.manual_seed(0)
    if name == "bert-base":
        eager = bert_base()
        converted = tw.convert_model(eager, "int8")
        return (
            eager,
            {
                "compiled": torch.compile(eager),
                "int8": converted,
                "int8, compiled": torch.compile(converted),
                'int8, backend="tilewright"': torch.compile(eager, backend=backend, options={"recipe": "int8"}),
                "torchao int8, compiled": torch.compile(torchao_int8(eager)),
            },
            lambda batch: torch.randint(0, 30000, (batch, tokens)),
        )
    eager = image_network(name)
    images = [torch.randn(4, 3, 224, 224) for _ in range(2)]
    fused, converted = tw.convert_model(eager, "fuse"), tw.convert_model(eager, "int8", calibration_data=images)
    return (
        eager,
        {
            "compiled": torch.compile(eager),
            "fused": fused,
            "fused, compiled": torch.compile(fused),
            'fused, backend="tilewright"': torch.compile(eager, backend=backend),
            "int8": converted,
            "int8, compiled": torch.compile(converted),
            "torchao int8, compiled": torch.compile(torchao_int8(eager)),
        },
        lambda batch: torch.randn(batch, 3, 224, 224),
    )


def made_from(variant: str) -> tuple[str, str]:
    """What a variant must agree with, and in which arithmetic; itself where there is nothing."""
    if variant.startswith("torchao") or variant == "int8":
        return variant, "int8"
    return ("int8", "int8") if variant.startswith("int8") else ("eager", "float")


def measure(name: str, batches: list[int], seconds: float, tokens: int) -> list[dict[str, object]]:
    """A row for each batch and variant. Raises ValueError if a result is wrong."""
    rows: list[dict[str, object]] = []
    for batch in batches:
        torch._dynamo.reset()
        eager, contestants, inputs = variants(name, tokens)
        x = inputs(batch)
        with torch.no_grad():
            found = {"eager": eager(x)}
            for variant, run in contestants.items():
                for _ in range(3):
                    found[variant] = run(x)
            errors = {variant: _error(found[variant], found["eager"]) for variant in found}
            for variant in found:
                source, arithmetic = made_from(variant)
                error = _error(found[variant], found[source])
                if not error <= LARGEST_ERRORS[arithmetic]:
                    raise ValueError(f"{variant} {name} at batch {batch} is off {source} by {error:.2g}")
            calls = {v: (lambda run=run, x=x: run(x)) for v, run in {"eager": eager, **contestants}.items()}
            medians = interleaved(calls, seconds=seconds, rest=True).medians()
        rows += [
            {
                "model": name,
                "batch": batch,
                "variant": variant,
                "ms": f"{1e3 * value:.2f}",
                "speedup": f"{medians['eager'] / value:.2f}",
                "error": f"{errors[variant]:.2g}",
            }
            for variant, value in medians.items()
        ]
    return rows


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def table(rows: list[dict[str, object]]) -> str:
    """Speed-ups over eager float32 as Markdown, a column for each model and batch."""
    columns = list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    found = {(row["variant"], row["model"], row["batch"]): f"{row['speedup']}x" for row in rows}
    lines = ["| | " + " | ".join(f"{model}, batch {batch}" for model, batch in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        lines.append(f"| {variant} | " + " | ".join(found.get((variant, *c), "-") for c in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the rows with what they were measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("bert-base", "resnet50"), default=["bert-base", "resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=8.0, help="for each model and batch; default: 8")
    parser.add_argument("--tokens", type=int, default=32, help="in each sequence of text; default: 32")
    parser.add_argument("--csv", type=Path, help=f"where to write the rows, for example {RESULTS / 'cpu_compiled.csv'}")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows = [row for name in options.models for row in measure(name, options.batches, options.seconds, options.tokens)]
    for row in rows:
        print(
            f"{row['model']:<10} {row['batch']:>3}  {row['variant']:<28} {row['ms']:>9} ms {row['speedup']:>6}x"
            f"  error {row['error']}"
        )
    print(table(rows))
    if options.csv:
        write_measured(options.csv, rows)


if __name__ == "__main__":
    main()
