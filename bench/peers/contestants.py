"""Who takes part: each a name, what it multiplies, and the function that makes its calls, loaded in its own process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass
class Prepared:
    """A piece of work ready to be timed.

    call: computes it once, or ``steps`` times in a row. result: what it answers, to be compared with float32; where
    None, what ``call`` returns. between: to be done after each call and not timed. own_clock: ``call`` returns the
    seconds that it took by the contestant's own clock.
    """

    call: Call
    result: Callable[[], torch.Tensor] | None = None
    between: Call | None = None
    steps: int = 1
    own_clock: bool = False


#: Makes a piece of work from the name of a model, the shape of its input, whether to decode, a folder, threads.
Make = Callable[[str, tuple[int, ...], bool, Path, int], Prepared]


@dataclass(frozen=True)
class Contestant:
    """format: what it multiplies. maker: "module:function" of a ``Make``. packages: that it needs."""

    name: str
    format: str
    maker: str
    packages: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """Whether it is Tilewright."""
        return self.name.startswith("Tilewright")


EAGER = "PyTorch fp32"
_ONNX = ("onnx", "onnxruntime")
_ALL = (
    Contestant(EAGER, "fp32", "bench.peers.pytorch:eager"),
    Contestant("Tilewright fp32", "fp32", "bench.peers.ours:fused"),
    Contestant("Tilewright int8", "int8", "bench.peers.ours:int8"),
    Contestant("Tilewright int8 weight-only", "int8 weights", "bench.peers.ours:int8_weight_only"),
    Contestant("Tilewright int4", "int4", "bench.peers.ours:int4"),
    Contestant("Tilewright w4a8", "int4 x int8", "bench.peers.ours:w4a8"),
    Contestant("torch.compile fp32", "fp32", "bench.peers.pytorch:compiled"),
    Contestant("torchao int8", "int8", "bench.peers.pytorch:torchao_int8", ("torchao",)),
    Contestant("ONNX Runtime fp32", "fp32", "bench.peers.onnx_runtime:fp32", _ONNX),
    Contestant("ONNX Runtime int8, dynamic", "int8", "bench.peers.onnx_runtime:dynamic", _ONNX),
    Contestant("ONNX Runtime int8, fused", "int8", "bench.peers.onnx_runtime:fused", _ONNX),
    Contestant("ONNX Runtime int8, QDQ", "int8", "bench.peers.onnx_runtime:static", _ONNX),
    Contestant("ONNX Runtime MatMulNBits", "int4 x int8", "bench.peers.onnx_runtime:nbits", _ONNX),
    Contestant("OpenVINO fp32", "fp32", "bench.peers.openvino:fp32", ("openvino",)),
    Contestant("OpenVINO int8", "int8", "bench.peers.openvino:int8", ("openvino", "nncf")),
    Contestant("OpenVINO int8, bf16", "int8", "bench.peers.openvino:int8_bf16", ("openvino", "nncf")),
    Contestant("OpenVINO int4", "int4", "bench.peers.openvino:int4", ("openvino", "nncf")),
    Contestant("OpenVINO int4, bf16", "int4", "bench.peers.openvino:int4_bf16", ("openvino", "nncf")),
    Contestant("llama.cpp Q4_0", "int4 x int8", "bench.peers.llama_cpp:q4_0", ("xllamacpp", "gguf")),
    Contestant("llama.cpp Q8_0", "int8", "bench.peers.llama_cpp:q8_0", ("xllamacpp", "gguf")),
)
CONTESTANTS = {one.name: one for one in _ALL}
