"""What a user has without Tilewright: every linear layer that is installed here, as functions of the same float input.

A variant that cannot be made here raises ``Missing`` with the reason, and the table says so: nothing is left out in
silence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import tilewright.nn as tnn
from bench.missing import Missing, need

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to compute a linear layer.

    make: from the float layer, on its device, and from the number of rows it is made for, a function of x. format: what
    it multiplies, as the plot groups it. ours: ours. error: largest relative error of the output, on random normal
    data, that is still the format's own rounding. operation: what the arithmetic's ceiling is taken of. weight_bits: of
    one weight, scales included.
    """

    name: str
    format: str
    make: Callable[[nn.Linear, int], Run]
    error: float
    weight_bits: float
    operation: torch.dtype
    ours: bool = False


def plain(linear: nn.Linear, m: int) -> Run:
    """``F.linear``."""
    return linear


def onednn(linear: nn.Linear, m: int) -> Run:
    """oneDNN's prepacked float32 product, which PyTorch uses under torch.compile with frozen weights only."""
    bias = None if linear.bias is None else linear.bias.detach()
    packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def bfloat16(linear: nn.Linear, m: int) -> Run:
    """The layer in bfloat16, the input cast on the way."""
    low = copy.deepcopy(linear).bfloat16()
    return lambda x: low(x.bfloat16())


def compiled(linear: nn.Linear, m: int) -> Run:
    """``torch.compile(mode="max-autotune")``."""
    return torch.compile(copy.deepcopy(linear), mode="max-autotune", dynamic=False)


def _torchao(config: str, **options: Any) -> Callable[[nn.Linear, int], Run]:
    def make(linear: nn.Linear, m: int) -> Run:
        need("torchao")
        from torchao import quantization

        if not hasattr(quantization, config):
            raise Missing(f"this torchao has no {config}")
        model = nn.Sequential(copy.deepcopy(linear))
        if linear.weight.device.type == "cuda":
            model = model.bfloat16()
        quantization.quantize_(model, getattr(quantization, config)(**options))
        compiled = torch.compile(model, mode="max-autotune", dynamic=False)
        if linear.weight.device.type == "cpu":
            import torch._inductor.config as inductor

            # Without frozen weights Inductor does not choose the prepacked integer product, and dequantises the weight
            # in every call (27 ms instead of 2.2). It looks at the setting when it compiles, which is now, for an input
            # like those to come: it would compile anew for one made outside of inference mode.
            with torch.inference_mode(False):
                x = torch.zeros(m, linear.in_features)
            with inductor.patch(freezing=True):
                compiled(x)
        return compiled

    return make


def _onnx_session(linear: nn.Linear, quantize: Callable[[Any, str], str]) -> Run:
    for package in ("onnx", "onnxruntime"):
        need(package)
    import tempfile

    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from bench.onnx_peers import session_options

    options = session_options(torch.get_num_threads())
    n, k = linear.weight.shape
    weight = numpy_helper.from_array(linear.weight.detach().t().contiguous().numpy(), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y" if linear.bias is None else "p"], name="product")]
    constants = [weight]
    if linear.bias is not None:
        constants.append(numpy_helper.from_array(linear.bias.detach().numpy(), "b"))
        nodes.append(helper.make_node("Add", ["p", "b"], ["y"]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", size]) for name, size in (("x", k), ("y", n)))
    graph = helper.make_graph(nodes, "linear", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with tempfile.TemporaryDirectory() as folder:
        plain_path = f"{folder}/plain.onnx"
        onnx.save(model, plain_path)
        path = quantize(model, folder)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def onnx_int8(linear: nn.Linear, m: int) -> Run:
    """ONNX Runtime, activations quantised on the fly, int8 weights per channel."""

    def quantize(model: Any, folder: str) -> str:
        from onnxruntime import quantization

        quantization.quantize_dynamic(
            f"{folder}/plain.onnx", f"{folder}/int8.onnx", per_channel=True, weight_type=quantization.QuantType.QInt8
        )
        return f"{folder}/int8.onnx"

    return _onnx_session(linear, quantize)


def _onnx_nbits(accuracy: int) -> Callable[[nn.Linear, int], Run]:
    def make(linear: nn.Linear, m: int) -> Run:
        def quantize(model: Any, folder: str) -> str:
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

            made = MatMulNBitsQuantizer(model, bits=4, block_size=128, is_symmetric=True, accuracy_level=accuracy)
            made.process()
            made.model.save_model_to_file(f"{folder}/int4.onnx", use_external_data_format=False)
            return f"{folder}/int4.onnx"

        return _onnx_session(linear, quantize)

    return make


def _ours(kind: Any, **options: Any) -> Callable[[nn.Linear, int], Run]:
    return lambda linear, m: kind.from_float(linear, **options)


_MINMAX = {"range_search": "minmax"}
_INT8, _BF16, _FP32 = torch.int8, torch.bfloat16, torch.float32
_BITS4 = 4 + 16 / 128
CPU = (
    Variant("PyTorch fp32 (MKL)", "fp32", plain, 1e-5, 32, _FP32),
    Variant("oneDNN fp32", "fp32", onednn, 1e-5, 32, _FP32),
    Variant("torch.compile fp32", "fp32", compiled, 1e-5, 32, _FP32),
    Variant("oneDNN bf16", "bf16", bfloat16, 0.01, 16, _BF16),
    Variant("torchao int8, compiled", "int8", _torchao("Int8DynamicActivationInt8WeightConfig"), 0.03, 8, _INT8),
    Variant("torchao int8 weight-only, compiled", "int8 weight", _torchao("Int8WeightOnlyConfig"), 0.03, 8, _BF16),
    Variant("ONNX Runtime int8", "int8", onnx_int8, 0.03, 8, _INT8),
    Variant("ONNX Runtime MatMulNBits", "int4", _onnx_nbits(0), 0.2, _BITS4, _FP32),
    Variant("ONNX Runtime MatMulNBits, int8", "int4 x int8", _onnx_nbits(4), 0.2, _BITS4, _INT8),
    Variant("Tilewright int8", "int8", _ours(tnn.Int8Linear), 0.03, 8, _INT8, ours=True),
    Variant("Tilewright int8 weight-only", "int8 weight", _ours(tnn.Int8WeightOnlyLinear), 0.03, 8, _BF16, ours=True),
    Variant("Tilewright int4 g128", "int4", _ours(tnn.Int4Linear, **_MINMAX), 0.2, _BITS4, _BF16, ours=True),
    Variant(
        "Tilewright int8 x int4 g128",
        "int4 x int8",
        _ours(tnn.Int8ActInt4WeightLinear, **_MINMAX),
        0.2,
        _BITS4,
        _INT8,
        ours=True,
    ),
)


# ---- on a GPU; x is bfloat16
def int_mm(linear: nn.Linear, m: int) -> Run:
    """cuBLASLt's int8 product with what a user must write around it."""
    if m <= 16:
        raise Missing("torch._int_mm takes more than 16 rows")
    scale = linear.weight.float().abs().amax(1) / 127
    q = (linear.weight.float() / scale[:, None]).round().to(torch.int8)
    bias = linear.bias

    def run(x: torch.Tensor) -> torch.Tensor:
        x_scale = x.float().abs().amax(1, keepdim=True) / 127
        total = torch._int_mm((x.float() / x_scale).round().to(torch.int8), q.t())
        y = (total * x_scale * scale).to(x.dtype)
        return y if bias is None else y + bias

    return run


def gemlite(linear: nn.Linear, m: int) -> Run:
    """GemLite's W4A16 in groups of 128."""
    need("gemlite")
    from gemlite.core import DType, GemLiteLinear

    n, k = linear.weight.shape
    weight = linear.weight.float().view(n, k // 128, 128)
    low, high = weight.amin(2, keepdim=True), weight.amax(2, keepdim=True)
    scale = (high - low) / 15
    zero = -low / scale
    q = (weight / scale + zero).round().clamp(0, 15).to(torch.uint8).view(n, k)
    layer = GemLiteLinear(4, 128, k, n, input_dtype=DType.BF16, output_dtype=DType.BF16)
    layer.pack(q, scale.view(n, -1).bfloat16(), zero.view(n, -1).bfloat16(), bias=linear.bias)
    return layer


def bitsandbytes(linear: nn.Linear, m: int) -> Run:
    """bitsandbytes' NF4."""
    need("bitsandbytes")
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.load_state_dict(linear.state_dict(), strict=False)
    return layer.cuda()


def semi_structured(linear: nn.Linear, m: int) -> Run:
    """2:4 by magnitude through cuSPARSELt, in bfloat16. Its output is checked against the pruned weight."""
    from torch.sparse import to_sparse_semi_structured

    groups = linear.weight.detach().view(linear.out_features, -1, 4)
    keep = torch.zeros_like(groups).scatter_(2, groups.abs().topk(2, dim=2).indices, 1)
    sparse = to_sparse_semi_structured((groups * keep).view_as(linear.weight))
    bias = None if linear.bias is None else linear.bias.detach()
    return lambda x: F.linear(x, sparse, bias)


GPU = (
    Variant("cuBLAS bf16", "bf16", plain, 0.01, 16, _BF16),
    Variant("torch.compile bf16", "bf16", compiled, 0.01, 16, _BF16),
    Variant("torch._int_mm int8", "int8", int_mm, 0.03, 8, _INT8),
    Variant("GemLite int4 g128", "int4", gemlite, 0.2, _BITS4, _BF16),
    Variant("torchao int4 g128", "int4", _torchao("Int4WeightOnlyConfig", group_size=128), 0.2, _BITS4, _BF16),
    Variant("torchao int8, compiled", "int8", _torchao("Int8DynamicActivationInt8WeightConfig"), 0.03, 8, _INT8),
    Variant("torchao int8 weight-only", "int8 weight", _torchao("Int8WeightOnlyConfig"), 0.03, 8, _BF16),
    Variant("bitsandbytes NF4", "int4", bitsandbytes, 0.2, 4.5, _BF16),
    Variant("cuSPARSELt 2:4 bf16", "2:4", semi_structured, 1.0, 9, _BF16),
    Variant("Tilewright int8", "int8", _ours(tnn.Int8Linear), 0.03, 8, _INT8, ours=True),
    Variant("Tilewright int8 weight-only", "int8 weight", _ours(tnn.Int8WeightOnlyLinear), 0.03, 8, _BF16, ours=True),
    Variant("Tilewright int4 g128", "int4", _ours(tnn.Int4Linear, **_MINMAX), 0.2, _BITS4, _BF16, ours=True),
    Variant(
        "Tilewright int8 x int4 g128",
        "int4 x int8",
        _ours(tnn.Int8ActInt4WeightLinear, **_MINMAX),
        0.2,
        _BITS4,
        _INT8,
        ours=True,
    ),
)
