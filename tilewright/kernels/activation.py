"""Activations that a kernel's epilogue can apply, and their definition in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: Those of every operator that has an epilogue.
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "relu6", "hardswish")
#: Those of the convolutions, which have a slope to give.
CONV_ACTIVATIONS = (*ACTIVATIONS, "leaky_relu")


def check_activation(name: str, known: tuple[str, ...] = ACTIVATIONS) -> None:
    """Raise ValueError unless ``name`` is one of ``known``."""
    if name not in known:
        raise ValueError(f"activation {name!r} is unknown; the known ones are {', '.join(known)}")


def apply_activation(x: torch.Tensor, name: str, inplace: bool = False, negative_slope: float = 0.01) -> torch.Tensor:
    """``x`` of any shape and float dtype through the activation called ``name``; NaN stays NaN.

    negative_slope: of "leaky_relu"; the others have none.
    """
    if name == "none":
        return x
    if name == "relu":
        return F.relu(x, inplace=inplace)
    if name == "silu":
        return F.silu(x, inplace=inplace)
    if name in ("gelu", "gelu_tanh"):
        approximate = "tanh" if name == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_(x, approximate=approximate) if inplace else F.gelu(x, approximate=approximate)
    if name == "relu6":
        return F.hardtanh(x, 0.0, 6.0, inplace=inplace)
    if name == "hardswish":
        return F.hardswish(x, inplace=inplace)
    if name == "leaky_relu":
        return F.leaky_relu(x, negative_slope, inplace=inplace)
    check_activation(name, CONV_ACTIVATIONS)
    raise AssertionError(name)


def activation_gradient(z: torch.Tensor, grad: torch.Tensor, name: str, negative_slope: float = 0.01) -> torch.Tensor:
    """``grad`` times the derivative at ``z`` of the activation called ``name``; shapes and dtypes alike."""
    aten = torch.ops.aten
    if name == "none":
        return grad
    if name == "relu":
        return aten.threshold_backward(grad, z, 0)
    if name == "silu":
        return aten.silu_backward(grad, z)
    if name in ("gelu", "gelu_tanh"):
        return aten.gelu_backward(grad, z, approximate="tanh" if name == "gelu_tanh" else "none")
    if name == "relu6":
        return aten.hardtanh_backward(grad, z, 0.0, 6.0)
    if name == "hardswish":
        return aten.hardswish_backward(grad, z)
    if name == "leaky_relu":
        return aten.leaky_relu_backward(grad, z, negative_slope, False)
    check_activation(name, CONV_ACTIVATIONS)
    raise AssertionError(name)
