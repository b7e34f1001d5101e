"""ONNX Runtime's int4 and int8 linear layers and whole models, as its own tools make them."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from torch import nn

from bench.peers.networks import HiddenState
from tilewright.kernels.formats import int4

GROUP = 128
Run = Callable[..., torch.Tensor]


@functools.cache
def _share_threads(threads: int) -> None:
    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def session_options(threads: int) -> Any:
    """Of sessions that share one pool of ``threads``, as PyTorch's layers do; to be called before anything else makes a
    session, and with one number in a process. Raises ValueError for another.

    With a pool for each session, the threads of the one that was called last spin for 50 ms beside those of the next:
    int8 4096 x 4096 at one row took 4 ms instead of 0.8.
    """
    _share_threads(threads)
    if _share_threads.cache_info().currsize > 1:
        raise ValueError(f"the sessions of this process do not have {threads} threads: there is one pool for all")
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    return options


def session(path: str | bytes, threads: int) -> Run:
    """A function of tensors in the order of the model's inputs that returns its first output."""
    made = onnxruntime.InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"])
    names = [value.name for value in made.get_inputs()]
    return lambda *xs: torch.from_numpy(made.run(None, {n: x.numpy() for n, x in zip(names, xs, strict=True)})[0])


def _model(nodes: list[Any], k: int, n: int, initializers: list[Any]) -> Any:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        helper.make_graph(nodes, "linear", [x], [y], initializers), opset_imports=opsets, ir_version=10
    )


def int4_linear(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, k: int, threads: int) -> Run:
    """MatMulNBits at accuracy level 4 (activations in int8) on the very integers and scales of our layer."""
    n, groups = scale.shape
    arrays = {"w": packed.view(torch.uint8).reshape(n, groups, GROUP // 2), "s": scale.float().reshape(-1)}
    if zero is not None:
        zeros = int4.unpack_zero(zero, n).to(torch.uint8)
        if groups % 2:
            zeros = nn.functional.pad(zeros, (0, 1))
        arrays["z"] = (zeros[:, ::2] | zeros[:, 1::2] << 4).reshape(-1)
    node = helper.make_node(
        "MatMulNBits",
        ["x", *arrays],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=4,
        block_size=GROUP,
        accuracy_level=4,
    )
    initializers = [numpy_helper.from_array(array.contiguous().numpy(), name) for name, array in arrays.items()]
    return session(_model([node], k, n, initializers).SerializeToString(), threads)


def int8_linear(weight: torch.Tensor, folder: Path, threads: int) -> Run:
    """A float product of weight [N, K], quantised by ``quantize_dynamic`` with a scale for each output channel."""
    session_options(threads)
    n, k = weight.shape
    plain, small = str(folder / "float.onnx"), str(folder / "int8.onnx")
    initializer = numpy_helper.from_array(weight.t().contiguous().numpy(), "w")
    onnx.save(_model([helper.make_node("MatMul", ["x", "w"], ["y"])], k, n, [initializer]), plain)
    _quantize(plain, small)
    return session(small, threads)


def _quantize(plain: str, small: str) -> None:
    quantization.quantize_dynamic(
        plain,
        small,
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        extra_options={
            "DefaultTensorType": TensorProto.FLOAT
        },  # it does not know the types that fused operators return
    )


def _fuse(source: str, target: str, heads: int, hidden: int) -> None:
    from onnxruntime.transformers import optimizer

    optimizer.optimize_model(source, "bert", num_heads=heads, hidden_size=hidden).save_model_to_file(target)


def encoders(encoder: nn.Module, heads: int, hidden: int, folder: Path, threads: int) -> dict[str, Run]:
    """ONNX Runtime's dynamic int8 sessions of a BERT: as exported, and after its optimiser for transformers, which
    fuses attention, GELU and normalisation.
    """
    plain, fused = str(folder / "float.onnx"), str(folder / "fused.onnx")
    inputs = (torch.ones(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.int64))
    names = ["input_ids", "attention_mask"]
    torch.onnx.export(
        HiddenState(encoder),
        inputs,
        plain,
        input_names=names,
        output_names=["hidden"],
        dynamic_axes={name: {0: "batch", 1: "sequence"} for name in (*names, "hidden")},
        dynamo=False,
    )
    # In a process of its own: the optimiser makes a session with its own pool, which is refused beside a shared one.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        other.submit(_fuse, plain, fused, heads, hidden).result()
    found = {}
    for name, path in (("ONNX Runtime int8", plain), ("ONNX Runtime int8, fused", fused)):
        _quantize(path, f"{path}.int8")
        found[name] = session(f"{path}.int8", threads)
    return found
