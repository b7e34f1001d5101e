"""What Inductor generates around an int8 linear layer on a GPU: seen into, opaque, and opaque with its epilogue.

    python -m bench.tables.inductor_view [--show]

Needs no GPU: the code generator runs on fake tensors of an sm_90, and launches, operators and buffers are counted in
its text. Where it is to see into the layer, a quantiser and a product in Triton stand in the place of ours.
"""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import wrap_triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import tilewright.kernels  # noqa: F401  (registers torch.ops.tilewright)

M, N, K = 256, 4096, 1024
LIMITS = {"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "warp_size": 32}
PROPERTIES = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="sm_90", **LIMITS)


@triton.jit
def _quantize(x, q, scale, k, block: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, block)
    value = tl.load(x + row * k + columns, mask=columns < k, other=0.0).to(tl.float32)
    step = tl.max(tl.abs(value), 0) / 127.0
    tl.store(scale + row, step)
    tl.store(q + row * k + columns, (value / step).to(tl.int8), mask=columns < k)


@triton.jit
def _multiply(q, q_scale, w, w_scale, y, n, k, rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr):
    m = tl.program_id(0) * rows + tl.arange(0, rows)
    c = tl.program_id(1) * columns + tl.arange(0, columns)
    d = tl.arange(0, depth)
    total = tl.zeros((rows, columns), tl.int32)
    for start in range(0, k, depth):
        a = tl.load(q + m[:, None] * k + (start + d)[None, :])
        b = tl.load(w + c[None, :] * k + (start + d)[:, None])
        total += tl.dot(a, b, out_dtype=tl.int32)
    out = total.to(tl.float32) * tl.load(q_scale + m)[:, None] * tl.load(w_scale + c)[None, :]
    tl.store(y + m[:, None] * n + c[None, :], out.to(tl.float16))


def seen(x: Any, w: Any, s: Any, b: Any, r: Any) -> Any:
    """As Inductor gets a ``triton_op``: two launches whose kernels it knows."""
    x = x * 2.0
    q, scale, y = torch.empty_like(x, dtype=torch.int8), x.new_empty(M, dtype=torch.float32), x.new_empty(M, N)
    wrap_triton(_quantize)[(M,)](x, q, scale, K, block=K)
    wrap_triton(_multiply)[(M // 64, N // 64)](q, scale, w, s, y, N, K, rows=64, columns=64, depth=64)
    return F.gelu(y + b) + r


def opaque(x: Any, w: Any, s: Any, b: Any, r: Any) -> Any:
    """Our operator, bias, activation and residual beside it."""
    return F.gelu(torch.ops.tilewright.int8_linear(x * 2.0, w, s) + b) + r


def rewritten(x: Any, w: Any, s: Any, b: Any, r: Any) -> Any:
    """Our operator as the backend calls it."""
    return torch.ops.tilewright.int8_linear(x * 2.0, w, s, b, r, "gelu")


class _Driver:
    """What Inductor and Triton ask of a GPU's driver before anything runs."""

    def get_current_target(self) -> GPUTarget:
        """An sm_90."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0


def _nothing(*_: Any) -> None:
    return None


def generated(function: Callable[..., Any]) -> str:
    """Inductor's wrapper code for ``function`` of (x [M, K], weight [N, K], scale [N], bias [N], residual [M, N])."""
    properties = DeviceProperties(type="cuda", index=0, multi_processor_count=132, cc=90, major=9, **LIMITS)
    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "get_device_properties", lambda device=None: PROPERTIES),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "is_available", lambda: True),
        (scheduler, "has_triton", lambda: True),  # remembered from before, it may say that there is no GPU
        (CudaInterface, "is_available", staticmethod(lambda: True)),
        (CudaInterface, "raise_if_triton_unavailable", staticmethod(_nothing)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda device=None: 90)),
        (CudaInterface, "current_device", staticmethod(lambda: 0)),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda device=None: PROPERTIES)),
        (CudaInterface.Worker, "current_device", staticmethod(lambda: 0)),
        (driver, "_active", _Driver()),
        (DeviceProperties, "create", staticmethod(lambda device: properties)),
    ]
    half = torch.float16
    sizes = (((M, K), half), ((N, K), torch.int8), ((N,), torch.float32), ((N,), half), ((M, N), half))
    try:
        for owner, name, value in patches:
            mock.patch.object(owner, name, value).start()
        with FakeTensorMode() as mode, V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            given = [torch.empty(size, dtype=dtype, device="cuda") for size, dtype in sizes]
            traced = make_fx(function, tracing_mode="fake", decomposition_table=select_decomp_table())(*given)
            graph = GraphLowering(traced)
            with V.set_graph_handler(graph):
                graph.run(*given)
                code, _ = graph.codegen()
    finally:
        mock.patch.stopall()
    text = str(getattr(code, "value", code))
    return text[text.index("def call(") : text.index("runner = ")]


def counts(code: str) -> dict[str, int]:
    """Launches of kernels, of them pointwise ones of Inductor's, calls of our operators, and buffers allocated."""
    return {
        "launches": len(re.findall(r"\.run\(", code)),
        "pointwise": len(re.findall(r"triton_poi_\w+\.run\(", code)),
        "operators": len(re.findall(r"= torch\.ops\.tilewright\.\w+", code)),
        "buffers": len(re.findall(r"= empty_strided_cuda\(", code)),
    }


def main() -> None:
    """Print the counts of each form, and its code if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the generated code too")
    options = parser.parse_args()
    for function in (seen, opaque, rewritten):
        code = generated(function)
        print(f"{function.__name__:<10}", ", ".join(f"{count} {name}" for name, count in counts(code).items()))
        if options.show:
            print(code)


if __name__ == "__main__":
    main()
