"""Random arguments for every operator, and what float64 mathematics says of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.kernels import exact
from tilewright.kernels.activation import apply_activation
from tilewright.kernels.formats import int4, int8, sparse24

SPARSE_OPS = ("sparse24_linear", "sparse24_int8_linear", "sparse24_int4_linear")
LINEAR_OPS = (
    "int8_linear",
    "int8_linear_quantized",
    "int8_weight_only_linear",
    "int4_linear",
    "int4_int8_linear",
    *SPARSE_OPS,
)
#: Operators that multiply in ``compute_dtype``.
COMPUTE_OPS = ("int8_weight_only_linear", "int4_linear", "sparse24_linear", "sparse24_int4_linear")
QUANTIZERS = ("quantize_per_row", "rms_norm_quantize", "layer_norm_quantize")


@dataclass(frozen=True)
class Case:
    """One call of a linear operator. ``str`` of it is the id of a test."""

    op: str
    m: int = 3
    n: int = 40
    k: int = 100
    dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype | None = None
    group_size: int = 32
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float32
    activation: str = "none"
    bias: bool = True
    residual: bool = False
    channel_scale: bool = False

    @property
    def is_int4(self) -> bool:
        return "int4_" in self.op

    @property
    def is_sparse(self) -> bool:
        return self.op in SPARSE_OPS

    @property
    def multiplies_floats(self) -> bool:
        return self.op in COMPUTE_OPS

    def __str__(self) -> str:
        parts = [self.op, f"{self.m}x{self.n}x{self.k}", str(self.dtype).removeprefix("torch.")]
        if self.compute_dtype is not None:
            parts.append("in-" + str(self.compute_dtype).removeprefix("torch."))
        if self.is_int4:
            parts.append(f"g{self.group_size}" + ("" if self.symmetric else "-asymmetric"))
        if self.scale_dtype != torch.float32:
            parts.append("scales-" + str(self.scale_dtype).removeprefix("torch."))
        if self.activation != "none":
            parts.append(self.activation)
        parts += [name for name in ("residual", "channel_scale") if getattr(self, name)]
        return "-".join(parts if self.bias else [*parts, "no_bias"])

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


def make(case: Case, seed: int = 0) -> dict[str, Any]:
    """Arguments by name."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    weight = randn(case.n, case.k) * 0.1
    arguments: dict[str, Any] = {}
    if case.op == "int8_linear_quantized":
        arguments["x"] = torch.randint(-127, 128, (case.m, case.k), generator=g, dtype=torch.int8)
        arguments["x_scale"] = torch.rand(case.m, generator=g) + 0.01
        arguments["out_dtype"] = case.dtype
    else:
        arguments["x"] = randn(case.m, case.k).to(case.dtype)
    if case.is_sparse:
        arguments |= _sparse_weight(case, weight)
    elif case.is_int4:
        packed, scale, zero = int4.quantize(weight, case.group_size, case.symmetric, scale_dtype=case.scale_dtype)
        size = int4.resolve_group_size(case.k, case.group_size)
        arguments |= {"weight_packed": packed, "weight_scale": scale, "weight_zero": zero, "group_size": size}
    else:
        arguments["weight"], arguments["weight_scale"] = int8.quantize(weight)
    arguments["bias"] = randn(case.n).to(case.dtype) if case.bias else None
    arguments["residual"] = randn(case.m, case.n).to(case.dtype) if case.residual else None
    arguments["activation"] = case.activation
    if case.multiplies_floats:
        arguments["compute_dtype"] = case.compute_dtype
    if case.op in ("int8_linear", "int4_int8_linear", "sparse24_int8_linear"):
        arguments["channel_scale"] = torch.rand(case.k, generator=g) + 0.5 if case.channel_scale else None
    return arguments


def _sparse_weight(case: Case, weight: torch.Tensor) -> dict[str, Any]:
    mask = sparse24.best_mask(weight.abs())
    values, meta = sparse24.pack(weight, mask)
    if case.op == "sparse24_linear":
        return {"weight_values": values.to(case.compute_dtype or case.dtype), "weight_meta": meta}
    if not case.is_int4:
        values, scale = int8.quantize(values)
        return {"weight_values": values, "weight_meta": meta, "weight_scale": scale}
    # Groups of columns are made of groups of four.
    size = int4.resolve_group_size(case.k, case.group_size if case.group_size < 0 else -(-case.group_size // 4) * 4)
    kept = sparse24.kept_group_size(case.k, size)
    packed, scale, zero = int4.quantize(values, kept, case.symmetric, scale_dtype=case.scale_dtype)
    weights = {"weight_values": packed, "weight_meta": meta, "weight_scale": scale, "weight_zero": zero}
    return {**weights, "group_size": size}


def float64(case: Case, arguments: dict[str, Any]) -> torch.Tensor:
    """The operator in float64 on these arguments. Only rounding to int8, which is part of what is defined, remains."""
    if case.multiplies_floats:
        z = exact.weight_only(arguments["x"], weight64(case, arguments))
    else:
        q, scale = integers(case, arguments)
        if case.is_sparse:
            weight = exact.dense_of_24(arguments["weight_values"].numpy(), arguments["weight_meta"], q.shape[-1])
            z = exact.int8_linear(q, scale, torch.from_numpy(weight), arguments["weight_scale"])
        elif case.is_int4:
            z = exact.int4_int8_linear(q, scale, arguments)
        else:
            z = exact.int8_linear(q, scale, arguments["weight"], arguments["weight_scale"])
    return exact.finish(z, arguments["bias"], arguments["residual"], arguments["activation"])


def integers(case: Case, arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The int8 activations that the operator multiplies, as int64, and their scales."""
    if case.op == "int8_linear_quantized":
        return arguments["x"].numpy().astype(np.int64), arguments["x_scale"].numpy()
    return exact.quantize(arguments["x"], arguments["channel_scale"])


def weight64(case: Case, arguments: dict[str, Any]) -> np.ndarray:
    """The dequantised weight, NumPy float64 [N, K]."""
    if case.is_sparse:
        return _sparse64(case, arguments)
    if not case.is_int4:
        return exact.array(arguments["weight"]) * exact.array(arguments["weight_scale"])[:, None]
    zero, size = arguments["weight_zero"], arguments["group_size"]
    k = arguments["x"].shape[-1]
    return exact.int4_weight(arguments["weight_packed"], arguments["weight_scale"], zero, size, k)


def _sparse64(case: Case, arguments: dict[str, Any]) -> np.ndarray:
    values, k = arguments["weight_values"], arguments["x"].shape[-1]
    if case.is_int4:
        scale, zero = arguments["weight_scale"], arguments["weight_zero"]
        kept = exact.int4_values(values, scale, zero, arguments["group_size"], k)
    else:
        kept = exact.array(values)
        if "weight_scale" in arguments:
            kept = kept * exact.array(arguments["weight_scale"])[:, None]
    return exact.dense_of_24(kept, arguments["weight_meta"], k)


def plain(case: Case, arguments: dict[str, Any]) -> torch.Tensor:
    """The expression that a user of plain PyTorch would have: what errors are measured against.

    That is ``F.linear`` of the dequantised weight in the dtype multiplied in. On int8 activations it is ``F.linear`` of
    dequantised operands in float32 whatever the dtype of x, the stricter choice.
    """
    bias, residual, dtype = arguments["bias"], arguments["residual"], case.dtype
    weight, x = torch.from_numpy(weight64(case, arguments)), arguments["x"]
    if case.multiplies_floats:
        narrow = case.compute_dtype or dtype
        y = F.linear(x.to(narrow), weight.to(narrow))
        y = y if dtype == torch.float64 else y.float()
    else:
        q, scale = integers(case, arguments)
        y = F.linear(torch.from_numpy(q).float() * torch.from_numpy(scale).unsqueeze(-1), weight.float())
    if bias is not None:
        y = y + bias.to(y.dtype)
    y = apply_activation(y, case.activation)
    return (y if residual is None else y + residual.to(y.dtype)).to(dtype)
