"""Single layers: which are linear, why one must be left alone, what of it moves to its replacement."""

from __future__ import annotations

import sys

import torch
from torch import nn

from tilewright.convert.plain_forward import computes_as
from tilewright.kernels.dispatch.layers import invalidate as invalidate_calls
from tilewright.kernels.formats.ranges import all_finite
from tilewright.nn import ConvLayer, QuantizedLinear
from tilewright.nn.conv_layer import pads_by_size

#: Base classes of what a conversion puts in place of a layer.
CONVERTED = (QuantizedLinear, ConvLayer)

#: Dtypes of float weights that the operators work in.
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Attributes of a module: hooks on its ``state_dict``, and hooks on its calls.
_STATE_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name and "state_dict" in name)
_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name and "state_dict" not in name)
_STANDARD_ATTRIBUTES = frozenset(vars(nn.Linear(1, 1, device="meta"))) | vars(nn.Conv2d(1, 1, 1, device="meta")).keys()


def conv1d_class() -> type[nn.Module] | None:
    """The ``Conv1D`` of Hugging Face transformers (GPT-2's linear layer, weight [in, out]), if that module is loaded.

    A model that holds one has loaded it, so there is no need to import transformers in order to look.
    """
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is the linear layer with a transposed weight described at ``conv1d_class``."""
    conv1d = conv1d_class()
    return conv1d is not None and isinstance(module, conv1d)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a float linear layer of any kind, convertible or not."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_converted(module: nn.Module) -> bool:
    """Whether ``module`` is the result of a conversion."""
    return isinstance(module, CONVERTED)


def as_linear(module: nn.Module) -> nn.Linear:
    """The layer as ``nn.Linear`` (weight [out, in]) over the same memory; ``module`` itself if it is one."""
    if not is_conv1d(module):
        return module  # type: ignore[return-value]
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    linear = nn.Linear(
        weight.shape[0], weight.shape[1], bias=module.bias is not None, device="meta", dtype=weight.dtype
    )
    linear.weight = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
    linear.bias = module.bias  # type: ignore[assignment]
    return linear


def plain_of(module: QuantizedLinear | ConvLayer) -> nn.Module:
    """The plain layer with dequantised weights, of the type that was converted."""
    plain: nn.Module = module.to_float()
    return as_conv1d(plain) if isinstance(plain, nn.Linear) and module.origin == "Conv1D" else plain


def as_conv1d(linear: nn.Linear) -> nn.Module:
    """The reverse of ``as_linear``: a Hugging Face ``Conv1D`` with a weight [in, out] of its own."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        conv1d = Conv1D(linear.out_features, linear.in_features)
    requires_grad = linear.weight.requires_grad
    conv1d.weight = nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=requires_grad)
    conv1d.bias = linear.bias
    return conv1d


def why_not_linear(module: nn.Module) -> str | None:
    """Why a linear layer cannot be replaced by a quantised one; None if it can."""
    kind = type(module).__name__
    plain = (is_conv1d(module) and conv1d_class()) or nn.Linear
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight instead of calling it"
    if reason := _why_not_instance(module):
        return reason
    if not computes_as(module, plain):
        return f"{kind} is a subclass of {plain.__name__} with a forward of its own"
    return why_not_parameters(module)


def _why_not_instance(module: nn.Module) -> str | None:
    if hasattr(module, "_hf_hook"):
        remove = "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        return f"accelerate's hooks replaced its forward: {remove} first"
    # accelerate puts the method itself there when it takes its hooks off.
    if getattr(vars(module).get("forward", module.forward), "__func__", None) is not type(module).forward:
        return "its forward was replaced on the instance"
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrized: remove the parametrization first"
    return None


def why_not_parameters(module: nn.Module) -> str | None:
    """Why what a layer holds cannot be replaced by a quantised weight and a bias; None if it can."""
    extra = sorted({*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"})
    weight = module._parameters.get("weight")
    if extra or weight is None:
        held = ", ".join(extra) or "none"
        return f"its weight is not a plain parameter (it holds {held}), as after pruning or weight_norm"
    if reason := why_not_weight(weight):
        return reason
    hooks = any(vars(module).get(name) for name in _STATE_HOOKS)
    return "hooks on its state_dict expect the float weight" if hooks else None


def why_not_convolution(module: nn.Module) -> str | None:
    """Why a convolution cannot be replaced by a fused one, but for what its weight tells; None if it can."""
    kind = type(module).__name__
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return f"{kind}: transposed convolutions have no fused kernel"
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return f"{kind}: only one- and two-dimensional convolutions have a fused kernel"
    if reason := _why_not_instance(module):
        return reason
    plain = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
    if not pads_by_size(module) and not computes_as(module, plain):
        return f"{kind} is a subclass of {plain.__name__} with a forward of its own"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}: the fused kernels pad with zeros"
    return None


def why_not_weight(weight: torch.Tensor) -> str | None:
    """Why a weight cannot be quantised; None if it can."""
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "it is lazy and has not seen an input yet: call the model once first"
    if type(weight) not in (nn.Parameter, torch.Tensor) or type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.dtype not in WEIGHT_DTYPES:
        kind = str(weight.dtype).removeprefix("torch.")
        return f"its weight is {kind}, not float32, float16 or bfloat16"
    if weight.device.type == "meta":
        return "its weight is on the meta device and has no values"
    if not weight.numel():
        return "its weight is empty"
    if not all_finite(weight.detach()):
        return "its weight holds NaN or Inf"
    return None


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` what the user had put on ``old``: hooks, training flag, attributes that are not a layer's own.

    Linear layers share the bias too; that of a convolution may hold a batch-norm's.

    The hook dictionaries themselves move, so that handles returned by ``register_forward_hook`` still remove their
    hook.
    """
    new.train(old.training)
    invalidate_calls(old)
    for name in _HOOKS:
        if name in vars(old):
            vars(new)[name] = vars(old)[name]
    if not isinstance(old, ConvLayer) and not isinstance(new, ConvLayer) and old._parameters.get("bias") is not None:
        new.bias = old.bias
    own = _STANDARD_ATTRIBUTES
    if isinstance(old, CONVERTED):
        own = frozenset(vars(type(old)(**old.config(), device="meta")))
    for name, value in vars(old).items():
        if name not in own and name not in vars(new) and not hasattr(type(new), name):
            vars(new)[name] = value
