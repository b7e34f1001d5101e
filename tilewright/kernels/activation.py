"""Activations that a kernel's epilogue can apply, and their definition in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def check_activation(name: str) -> None:
    """Raise ValueError unless ``name`` is one of ``ACTIVATIONS``."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; the known ones are {', '.join(ACTIVATIONS)}")


def apply_activation(x: torch.Tensor, name: str, inplace: bool = False) -> torch.Tensor:
    """``x`` of any shape and float dtype through the activation called ``name``; NaN stays NaN."""
    if name == "none":
        return x
    if name == "relu":
        return F.relu(x, inplace=inplace)
    if name == "silu":
        return F.silu(x, inplace=inplace)
    if name in ("gelu", "gelu_tanh"):
        approximate = "tanh" if name == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_(x, approximate=approximate) if inplace else F.gelu(x, approximate=approximate)
    check_activation(name)
    raise AssertionError(name)
