"""ONNX Runtime: the float model, its dynamic and static int8, and int4 weights with int8 activations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from bench.missing import Missing
from bench.peers import networks
from bench.peers.contestants import Prepared

GROUP = 128
#: A type that its quantiser takes for the results of operators it does not know, such as fused ones.
_DYNAMIC = {"DefaultTensorType": onnx.TensorProto.FLOAT}


class _Product(nn.Module):
    """A layer as MatMul and Add: its quantisers know no Gemm."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(layer.weight.detach().t().contiguous()), layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] -> [M, N]"""
        return x @ self.weight + self.bias


def _exported(name: str, folder: Path) -> Path:
    """The float model as ONNX for every batch, written once for all contestants."""
    path = folder / f"{name}.onnx"
    if path.exists():
        return path
    model = networks.plain(name, networks.network(name))
    given = networks.inputs(name, (2, 16) if name in networks.ENCODERS else (2,))
    names = [f"x{i}" for i in range(len(given))]
    varying = {0: "batch", 1: "sequence"} if name in networks.ENCODERS else {0: "batch"}
    torch.onnx.export(
        _Product(model) if isinstance(model, nn.Linear) else model,
        given,
        str(path),
        input_names=names,
        output_names=["y"],
        dynamic_axes=dict.fromkeys((*names, "y"), varying),
        dynamo=False,
    )
    return path


def _prepared(path: Path, name: str, shape: tuple[int, ...], threads: int) -> Prepared:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {f"x{i}": value.numpy() for i, value in enumerate(networks.inputs(name, shape))}
    return Prepared(lambda: torch.from_numpy(session.run(None, given)[0]))


def fp32(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """The float model with all of the session's fusions."""
    return _prepared(_exported(name, folder), name, shape, threads)


def _dynamic(source: Path, target: Path) -> None:
    quantization.quantize_dynamic(
        str(source),
        str(target),
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        extra_options=_DYNAMIC,
    )


def dynamic(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """``quantize_dynamic``: activations on the fly, a scale per output channel."""
    path = folder / f"{name}.dynamic.onnx"
    if not path.exists():
        _dynamic(_exported(name, folder), path)
    return _prepared(path, name, shape, threads)


def fused(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """The same after its optimiser for transformers, which fuses attention, GELU and normalisation."""
    from onnxruntime.transformers import optimizer

    path = folder / f"{name}.fused.onnx"
    if not path.exists():
        config = networks.network(name).config
        made = optimizer.optimize_model(
            str(_exported(name, folder)),
            "bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
        )
        source = folder / f"{name}.optimised.onnx"
        made.save_model_to_file(str(source))
        _dynamic(source, path)
    return _prepared(path, name, shape, threads)


class _Reader(quantization.CalibrationDataReader):
    def __init__(self, name: str) -> None:
        self.batches: Iterator[networks.Inputs] = iter(networks.calibration(name))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {f"x{i}": value.numpy() for i, value in enumerate(batch)}


def static(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """``quantize_static``: QDQ, a scale per output channel, unsigned activations."""
    path = folder / f"{name}.static.onnx"
    if not path.exists():
        ready = folder / f"{name}.ready.onnx"
        quant_pre_process(str(_exported(name, folder)), str(ready), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(ready),
            str(path),
            _Reader(name),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    return _prepared(path, name, shape, threads)


def nbits(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """MatMulNBits at accuracy level 4: symmetric int4 in groups of 128, activations in int8."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    if " x " not in name:
        raise Missing("set up for single layers only")
    path = folder / f"{name}.nbits.onnx"
    if not path.exists():
        source = onnx.load(str(_exported(name, folder)))
        made = MatMulNBitsQuantizer(source, bits=4, block_size=GROUP, is_symmetric=True, accuracy_level=4)
        made.process()
        made.model.save_model_to_file(str(path), use_external_data_format=False)
    return _prepared(path, name, shape, threads)
