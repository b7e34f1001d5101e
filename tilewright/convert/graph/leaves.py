"""Which modules a graph shows as one call, and what is known of those it shows so."""

from __future__ import annotations

import torch
from torch import nn

from tilewright.convert.structure import ReplacedForward
from tilewright.kernels.activation import module_activation
from tilewright.nn import ConvLayer, FoldedBatchNorm, FusedActivation, QuantizedLinear
from tilewright.nn.conv_layer import pads_by_size

#: Classes of other libraries that normalise as a batch-norm in eval mode does; known by name, not imported.
NORM_NAMES = ("FrozenBatchNorm2d", "BatchNormAct2d", "FrozenBatchNormAct2d", "DetrFrozenBatchNorm2d")
#: Functions of other libraries that pad as TensorFlow's "SAME" does: (x, convolution) -> x.
SAME_PADDING_FUNCTIONS = ("apply_tf_padding",)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


_OURS = ReplacedForward()


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch-norm of any kind."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    return type(module).__name__ in NORM_NAMES and isinstance(getattr(module, "running_var", None), torch.Tensor)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` runs more than its ``forward``."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def replaces_forward(module: nn.Module) -> bool:
    """Whether somebody gave the instance a ``forward`` of its own."""
    return not isinstance(vars(module).get("forward", _OURS), ReplacedForward)


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph shows ``module`` as one call."""
    if isinstance(module, FoldedBatchNorm):
        return module.then is None
    if isinstance(module, (ConvLayer, QuantizedLinear, FusedActivation, torch.jit.ScriptModule)):
        return True
    if has_hooks(module) or replaces_forward(module) or is_norm(module) or pads_by_size(module):
        return True
    if module_activation(module) is not None:
        return True
    if isinstance(module, _CONTAINERS) and type(module).__module__.startswith("torch.nn"):
        return False
    if type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.", "torch._dynamo.")):
        return True
    return _keeps_forward(module)


def _keeps_forward(module: nn.Module) -> bool:
    """Whether ``module`` is of a subclass that keeps the forward of one of PyTorch's layers: it is that layer."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return any(
        base.__module__.startswith("torch.nn.modules") and base not in (nn.Module, *_CONTAINERS)
        for base in type(module).__mro__
        if "forward" in vars(base) and vars(base)["forward"] is type(module).forward
    )


def is_known(module: nn.Module) -> bool:
    """Whether a leaf is one of PyTorch's own or ours: it does the same operators in each call, in any memory layout."""
    if replaces_forward(module):
        return False
    if nn.utils.parametrize.is_parametrized(module):
        parts = list(module.parametrizations.modules())  # type: ignore[union-attr]
        return all(type(part).__module__.startswith("torch.nn.") for part in parts)
    if type(module).__module__.startswith(("torch.nn.", "tilewright.nn")):
        return True
    if is_norm(module) or module_activation(module) is not None:
        return True
    return not has_hooks(module) and (pads_by_size(module) or _keeps_forward(module))


def holds_convolution(module: nn.Module) -> bool:
    """Whether there is a convolution in ``module``."""
    return any(isinstance(part, (nn.modules.conv._ConvNd, ConvLayer)) for part in module.modules())
