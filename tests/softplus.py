"""An activation that the package does not have, as somebody else would add it."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from tilewright.kernels.activation import Activation, register_activation, unregister_activation


def softplus_row() -> Activation:
    aten = torch.ops.aten
    return Activation(
        "softplus",
        forward=lambda x, inplace, slope: F.softplus(x),
        backward=lambda grad, z, slope: aten.softplus_backward(grad, z, 1.0, 20.0),
        forms={
            nn.Softplus: lambda module: 0.0 if (module.beta, module.threshold) == (1, 20) else None,
            F.softplus: lambda: 0.0,
        },
        nonnegative=True,
        onnx=lambda write, y, slope: write("Softplus", y),
    )


def registered_softplus() -> Iterator[str]:
    """For a fixture: its name, while it is registered."""
    register_activation(softplus_row())
    try:
        yield "softplus"
    finally:
        unregister_activation("softplus")
