#!/usr/bin/env bash
# With an odd zero point, tools that quantise the same values disagree on every tie, two of them inside PyTorch.
#
# Versions: torch 2.13.0, onnxruntime 1.32.0, openvino 2026.4.1, onnx 1.23.2, numpy 2.4.6, all on the CPU. Scale and
#   values are powers of two and multiples of them, so no division rounds. The same was seen with PyTorch's default,
#   AVX2 and AVX-512 code.
# Expected: one integer for one value. ONNX rounds x / scale, ties to even, and then adds the zero point, and
#   `torch.fake_quantize_per_tensor_affine` is documented to do so too. PyTorch's pull request 37188 of 2020 is about
#   having both of its forms add the zero point after rounding.
# Seen: ONNX Runtime, `torch.fake_quantize_per_tensor_affine` and `quantized_decomposed.quantize_per_tensor` (which
#   quantisation of exported graphs writes) round first. `torch.quantize_per_tensor` and OpenVINO add first, and then round.
#   Where the zero point is even that is the same. Where it is odd, every tie goes to the other neighbour.
# Why it matters: values lie on ties when they were on a grid before, as images, sums of integers and the results of
#   another quantised layer do. Integers then differ by one step between training and conversion, and between two
#   runtimes, though each is right by itself. Compare integers of two tools only where the zero point is even.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 onnxruntime==1.32.0 openvino==2026.4.1 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import io

import numpy as np
import onnxruntime
import openvino
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from onnx import TensorProto, helper, numpy_helper

SCALE = 0.25
ties = ((np.arange(-50, 50) + 0.5) * SCALE).astype(np.float32)
x = torch.from_numpy(ties)


def onnx_model(zero_point):
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.INT8, ["n"])],
        [
            numpy_helper.from_array(np.asarray(SCALE, np.float32), "scale"),
            numpy_helper.from_array(np.asarray(zero_point, np.int8), "zero"),
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return made.SerializeToString()


def in_onnx_runtime(zero_point):
    session = onnxruntime.InferenceSession(onnx_model(zero_point), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": ties})[0]


def in_openvino(zero_point):
    core = openvino.Core()
    model = core.read_model(io.BytesIO(onnx_model(zero_point)))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled({"x": ties})[compiled.output(0)]


def fake(zero_point):
    return (torch.fake_quantize_per_tensor_affine(x, SCALE, zero_point, -128, 127) / SCALE + zero_point).numpy()


def decomposed(zero_point):
    operator = torch.ops.quantized_decomposed.quantize_per_tensor
    return operator(x, SCALE, zero_point, -128, 127, torch.int8).numpy()


def quantized(zero_point):
    return torch.quantize_per_tensor(x, SCALE, zero_point, torch.qint8).int_repr().numpy()


tools = {
    "ONNX Runtime": (in_onnx_runtime, "rounds first"),
    "torch.fake_quantize_per_tensor_affine": (fake, "rounds first"),
    "quantized_decomposed.quantize_per_tensor": (decomposed, "rounds first"),
    "torch.quantize_per_tensor": (quantized, "adds first"),
    "OpenVINO": (in_openvino, "adds first"),
}
as_described = True
for zero_point in (4, 5):
    rounds_first = np.rint(ties / SCALE) + zero_point
    adds_first = np.rint(ties / SCALE + zero_point)
    print(f"zero point {zero_point}: the two orders differ in {np.sum(rounds_first != adds_first)} of {len(ties)} ties")
    for name, (tool, order) in tools.items():
        found = tool(zero_point).astype(np.float64)
        differ = int(np.sum(found != rounds_first))
        print(f"  {name:41} differs from ONNX's formula in {differ}; 0.125 becomes {found[50]:g}")
        as_described = as_described and np.array_equal(found, rounds_first if order == "rounds first" else adds_first)
print("as described" if as_described else "CHANGED: not as described any more")
raise SystemExit(not as_described)
PYTHON
