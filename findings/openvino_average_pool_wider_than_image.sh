#!/usr/bin/env bash
# OpenVINO refuses an average pooling whose window is larger than the image, which PyTorch cuts off at the edges.
#
# Versions: openvino 2026.4.1 (CPU), torch 2.13.0, numpy 2.4.6, on x86-64.
# Expected: with ceil_mode=True a window of 1280 x 1280 over an image of 7 x 7 gives one pixel, the mean of the image:
#   PyTorch computes it so, and transformers' EfficientNet pools by it (AvgPool2d(hidden_dim, ceil_mode=True)).
# Seen: where the input's shape is known openvino.convert_model refuses the module, "kernel after dilation has size larger
#   than the data shape after padding"; where it is dynamic the model compiles, and the first inference raises the like. AdaptiveAvgPool2d(1), the same function, works.
# Why it matters: an EfficientNet of transformers cannot be exported to OpenVINO as it is, in float or in int8, and with
#   dynamic shapes nobody hears of it before the first call. Replace the pooling first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check openvino==2026.4.1 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import openvino
import torch
from torch import nn

x = torch.randn(1, 8, 7, 7)
pool, adaptive = nn.AvgPool2d(1280, ceil_mode=True), nn.AdaptiveAvgPool2d(1)
assert torch.allclose(pool(x), adaptive(x), atol=1e-6) and pool(x).shape == (1, 8, 1, 1)


def answer(module, shape):
    """The result, or what is said against it."""
    try:
        model = openvino.convert_model(module, example_input=x, input=openvino.PartialShape(shape))
        compiled = openvino.compile_model(model, "CPU")
    except Exception as error:
        return f"refused before a call: {error}"
    try:
        return compiled(x.numpy())[0]
    except RuntimeError as error:
        return f"refused in a call: {error}"


known, dynamic = answer(pool, [1, 8, 7, 7]), answer(pool, [1, 8, -1, -1])
print(" ".join(str(known).split())[:240], " ".join(str(dynamic).split())[:240], sep="\n")
assert isinstance(known, str) and known.startswith("refused before a call")
assert isinstance(dynamic, str) and dynamic.startswith("refused in a call")
for shape in ([1, 8, 7, 7], [1, 8, -1, -1]):
    assert np.allclose(answer(adaptive, shape), pool(x).numpy(), atol=1e-6)
PYTHON
echo "as described: a window larger than the image is refused"
