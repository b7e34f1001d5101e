"""What a router may look at: shapes, dtypes and the device, never a tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tilewright.kernels.conv_geometry import ConvGeometry


@dataclass(frozen=True)
class Problem:
    """One call of an operator.

    m, n, k: rows of activations, output features, input features. device: "cpu", "cuda", ... capability: (major, minor)
    on NVIDIA, None elsewhere. gpu_arch: e.g. "gfx942" on AMD. compute_dtype: what a weight-only operator multiplies in
    (None: x_dtype). group_size, symmetric, scale_dtype: of int4 weights.

    conv: sizes of a convolution, whose m, n and k are those of the product it amounts to: pixels of the result, output
    channels, values in the window of one group. out_dtype: what it returns. residual_dtype: None without a residual.

    keep_dequantized: the user wants a weight-only layer to hold its weight dequantised as well, for speed.

    device_name: what the driver calls a GPU: tables of tuned configurations are kept by it. aligned: rows of x begin
    where 16 bytes can be loaded at once.
    """

    op: str
    m: int
    n: int
    k: int
    x_dtype: torch.dtype
    device: str = "cpu"
    capability: tuple[int, int] | None = None
    gpu_arch: str | None = None
    multiprocessors: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype | None = None
    activation: str = "none"
    bias: bool = False
    residual: bool = False
    conv: ConvGeometry | None = None
    out_dtype: torch.dtype | None = None
    residual_dtype: torch.dtype | None = None
    allow_tf32: bool = False
    keep_dequantized: bool = False
    device_name: str = ""
    aligned: bool = True

    @property
    def multiply_dtype(self) -> torch.dtype:
        """The dtype that operands of a weight-only product are rounded to."""
        return self.compute_dtype or self.x_dtype

    @property
    def is_hopper(self) -> bool:
        """Whether the GPU has ``wgmma``, the matrix instruction of compute capability 9.x alone."""
        return self.capability is not None and self.capability[0] == 9

    def with_rows(self, m: int) -> Problem:
        """The same problem at another batch."""
        return replace(self, m=m)


def rows_aligned(x: torch.Tensor) -> bool:
    """``Problem.aligned`` of a matrix. Allocators align what they hand out, so only the offset in it counts."""
    size = x.element_size()
    return x.storage_offset() * size % 16 == 0 and x.stride(0) * size % 16 == 0


_device_facts: dict[torch.device, dict[str, Any]] = {}


def device_facts(device: torch.device) -> dict[str, Any]:
    """The fields of ``Problem`` that describe ``device``; asks the driver once for each GPU."""
    facts = _device_facts.get(device)
    if facts is None:
        facts = {"device": device.type}
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            facts["multiprocessors"] = properties.multi_processor_count
            facts["device_name"] = properties.name
            if torch.version.hip:
                facts["gpu_arch"] = properties.gcnArchName.split(":")[0]
            else:
                facts["capability"] = (properties.major, properties.minor)
        _device_facts[device] = facts
    return facts
