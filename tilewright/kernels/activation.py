"""THE table of activations: what each is, and what it is called wherever something computes or recognises it.

A new activation is one row. ``register_activation`` adds one from outside the package: operators then accept it by
name, the definition computes it, a converter recognises it, and kernels that do not have it decline.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

aten = torch.ops.aten

Family = Literal["linear", "convolution"]
#: Of a module, or of the arguments of a call after the first: the slope (0.0 where there is none) if they ask for this
#: activation, None if they ask for something else.
Reader = Callable[..., "float | None"]


@dataclass(frozen=True)
class Activation:
    """A row of the table.

    forward: (x, inplace, slope) -> the activation of ``x``, which is written over where ``inplace`` says so and there
    is such a form; NaN stays NaN. backward: (grad, z, slope) -> ``grad`` times the derivative at ``z``.

    operators: families that accept it by name; linear layers have no slope to give. forms: what means it in PyTorch
    and transformers: a class of modules or its dotted name, a function, the name of a method. nonnegative: whether no
    result is below 0.

    triton: whether ``kernels.triton.common.activate`` has it. native: families of C kernels that have it, as ``number``
    of c/activation.h. aten: the operator that PyTorch records for it alone, and the further arguments. onednn: name,
    scalars and algorithm; onednn_keeps_nan: whether NaN stays NaN there. onnx: (write, y, slope) -> it in ONNX, by
    calls of ``write(kind, *inputs, **attributes)``.
    """

    name: str
    forward: Callable[[torch.Tensor, bool, float], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    operators: Sequence[Family] = ("linear", "convolution")
    forms: Mapping[Any, Reader] = field(default_factory=dict)
    nonnegative: bool = False
    triton: bool = False
    native: Sequence[Family] = ()
    number: int | None = None
    aten: tuple[str, tuple[float, ...]] | None = None
    onednn: tuple[str, tuple[float, ...], str] | None = None
    onednn_keeps_nan: bool = True
    onnx: Callable[[Callable[..., Any], Any, float], Any] | None = None


# ---- readers
def _always(*_: Any, **__: Any) -> float:
    return 0.0


def _clamping(highest: float) -> dict[Any, Reader]:
    """Whatever clamps to 0 and ``highest``."""

    def clamp(min: Any = None, max: Any = None) -> float | None:
        return 0.0 if min == 0 and (math.inf if max is None else max) == highest else None

    def hardtanh(min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False) -> float | None:
        return clamp(min_val, max_val)

    return {
        nn.Hardtanh: lambda module: clamp(module.min_val, module.max_val),
        **dict.fromkeys((F.hardtanh, F.hardtanh_), hardtanh),
        **dict.fromkeys((torch.clamp, torch.clamp_min, "clamp", "clamp_", "clamp_min"), clamp),
    }


def _leaky(negative_slope: Any = 0.01, inplace: bool = False) -> float | None:
    return float(negative_slope) if isinstance(negative_slope, (int, float)) else None


# ---- the table
# What Triton has, as do the C kernels of both families.
_ours = functools.partial(Activation, triton=True, native=("linear", "convolution"))


def _gelu(name: str, kind: str, forms: Mapping[Any, Reader], number: int) -> Activation:
    """With the error function itself ("none"), or by tanh."""

    def called(approximate: str = "none") -> float | None:
        return 0.0 if approximate == kind else None

    return _ours(
        name,
        forward=lambda x, inplace, slope: (aten.gelu_ if inplace else F.gelu)(x, approximate=kind),
        backward=lambda grad, z, slope: aten.gelu_backward(grad, z, approximate=kind),
        forms={nn.GELU: lambda module: called(module.approximate), F.gelu: called, **forms},
        native=("linear",),
        number=number,
        onednn=("gelu", (), kind),
        onnx=lambda write, y, slope: write("Gelu", y, approximate=kind),
    )


def _silu_backward(grad: torch.Tensor, z: torch.Tensor, slope: float) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return aten.silu_backward(grad, z)
    gate = z.sigmoid()  # the operator has no derivative itself
    return grad * gate * (1 + z * (1 - gate))


_ROWS = (
    _ours(
        "none",
        forward=lambda x, inplace, slope: x,
        backward=lambda grad, z, slope: grad,
        number=0,
        onednn=("none", (), ""),
        onnx=lambda write, y, slope: y,
    ),
    _ours(
        "relu",
        forward=lambda x, inplace, slope: F.relu(x, inplace=inplace),
        backward=lambda grad, z, slope: aten.threshold_backward(grad, z, 0),
        forms={
            **dict.fromkeys((nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _always),
            **_clamping(math.inf),
        },
        nonnegative=True,
        number=1,
        aten=("relu", ()),
        onednn=("relu", (), ""),
        onednn_keeps_nan=False,
        onnx=lambda write, y, slope: write("Relu", y),
    ),
    _gelu(
        "gelu",
        "none",
        {"transformers.activations.GELUActivation": lambda module: 0.0 if module.act is F.gelu else None},
        number=7,
    ),
    _gelu(
        "gelu_tanh",
        "tanh",
        {f"transformers.activations.{kind}": _always for kind in ("NewGELUActivation", "GELUTanh")},
        number=8,
    ),
    _ours(
        "silu",
        forward=lambda x, inplace, slope: F.silu(x, inplace=inplace),
        backward=_silu_backward,
        forms=dict.fromkeys((nn.SiLU, F.silu, "transformers.activations.SiLUActivation"), _always),
        number=4,
        aten=("silu", ()),
        onednn=("swish", (), ""),
        onnx=lambda write, y, slope: write("Mul", y, write("Sigmoid", y)),
    ),
    _ours(
        "relu6",
        forward=lambda x, inplace, slope: F.hardtanh(x, 0.0, 6.0, inplace=inplace),
        backward=lambda grad, z, slope: aten.hardtanh_backward(grad, z, 0.0, 6.0),
        forms={**dict.fromkeys((nn.ReLU6, F.relu6), _always), **_clamping(6.0)},
        nonnegative=True,
        number=2,
        aten=("hardtanh", (0.0, 6.0)),
        onednn=("hardtanh", (0.0, 6.0), ""),
        onednn_keeps_nan=False,
        onnx=lambda write, y, slope: write("Clip", y, 0.0, 6.0),
    ),
    _ours(
        "hardswish",
        forward=lambda x, inplace, slope: F.hardswish(x, inplace=inplace),
        backward=lambda grad, z, slope: aten.hardswish_backward(grad, z),
        forms=dict.fromkeys((nn.Hardswish, F.hardswish), _always),
        number=3,
        aten=("hardswish", ()),
        onednn=("hardswish", (), ""),
        onnx=lambda write, y, slope: write("HardSwish", y),
    ),
    _ours(
        "leaky_relu",
        forward=lambda x, inplace, slope: F.leaky_relu(x, slope, inplace=inplace),
        backward=lambda grad, z, slope: aten.leaky_relu_backward(grad, z, slope, False),
        operators=("convolution",),
        forms={
            nn.LeakyReLU: lambda module: float(module.negative_slope),
            **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _leaky),
        },
        native=("convolution",),
        number=5,
        onnx=lambda write, y, slope: write("LeakyRelu", y, alpha=slope),
    ),
    # For the gates of squeeze-and-excite, which a recorded network computes by themselves; no operator has it.
    Activation(
        "sigmoid",
        forward=lambda x, inplace, slope: x.sigmoid_() if inplace else x.sigmoid(),
        backward=lambda grad, z, slope: aten.sigmoid_backward(grad, z.sigmoid()),
        operators=(),
        native=("convolution",),
        number=6,
        aten=("sigmoid", ()),
    ),
)
TABLE: dict[str, Activation] = {row.name: row for row in _ROWS}


def register_activation(row: Activation) -> None:
    """Add an activation. Raises ValueError if the name is taken."""
    if row.name in TABLE:
        raise ValueError(f"there is an activation {row.name!r} already")
    TABLE[row.name] = row


def unregister_activation(name: str) -> None:
    """Take away one that ``register_activation`` added. Raises ValueError for any other."""
    if TABLE.get(name) is None or TABLE[name] in _ROWS:
        raise ValueError(f"no activation {name!r} was registered")
    del TABLE[name]


class _Names(Sequence[str]):
    """Names of the rows that ``holds`` is true of, those added later too."""

    def __init__(self, holds: Callable[[Activation], bool]):
        self._holds = holds

    def __iter__(self) -> Iterator[str]:
        return (row.name for row in TABLE.values() if self._holds(row))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self)[index]


#: What linear operators accept.
ACTIVATIONS = _Names(lambda row: "linear" in row.operators)
#: What convolutions accept.
CONV_ACTIVATIONS = _Names(lambda row: "convolution" in row.operators)
#: What the Triton kernels have.
TRITON_ACTIVATIONS = _Names(lambda row: row.triton)


def check_activation(name: str, known: Sequence[str] = ACTIVATIONS) -> None:
    """Raise ValueError unless ``name`` is one of ``known``."""
    if name not in known:
        raise ValueError(f"activation {name!r} is unknown; the known ones are {', '.join(known)}")


def apply_activation(x: torch.Tensor, name: str, inplace: bool = False, negative_slope: float = 0.01) -> torch.Tensor:
    """``x`` of any shape and float dtype through the activation called ``name``; NaN stays NaN.

    inplace: whether ``x`` may be written over. negative_slope: of "leaky_relu"; the others have none.
    """
    if name not in TABLE:
        check_activation(name, CONV_ACTIVATIONS)
    return TABLE[name].forward(x, inplace, negative_slope)


def activation_gradient(z: torch.Tensor, grad: torch.Tensor, name: str, negative_slope: float = 0.01) -> torch.Tensor:
    """``grad`` times the derivative at ``z`` of the activation called ``name``; shapes and dtypes alike."""
    if name not in TABLE:
        check_activation(name, CONV_ACTIVATIONS)
    return TABLE[name].backward(grad, z, negative_slope)


# ---- recognising one
def called_activation(form: Any, *arguments: Any, **options: Any) -> tuple[str, float] | None:
    """Name and slope of the activation that ``form`` is with these arguments, or None.

    form: see ``Activation.forms``.
    """
    for row in TABLE.values():
        reader = row.forms.get(form)
        if reader is not None:
            try:
                slope = reader(*arguments, **options)
            except TypeError:  # an argument that the row knows nothing of
                continue
            if slope is not None:
                return row.name, slope
    return None


def module_activation(module: nn.Module) -> tuple[str, float] | None:
    """Name and slope of the activation that ``module`` is, or None. A subclass may compute something else: it is none.

    Other libraries' classes are known by their names, without importing them.
    """
    kind = type(module)
    return called_activation(kind, module) or called_activation(f"{kind.__module__}.{kind.__qualname__}", module)
