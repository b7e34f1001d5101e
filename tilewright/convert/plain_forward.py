"""Whether a subclass of one of PyTorch's layers that has a ``forward`` of its own computes what the layer does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

#: Rows of the weight that a linear layer is tried with.
_ROWS = 8
#: Relative error of a product in float64, with some room for a float32 on the way.
_TOLERANCE = 1e-6


def computes_as(module: nn.Module, plain: type[nn.Module]) -> bool:
    """Whether ``module``, of a subclass of ``plain``, computes what ``plain`` does, whatever its weight and bias are.

    plain: ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d``; of any other class the ``forward`` must be the same function.
    A ``forward`` of its own (Falcon's ``input @ self.weight.T``) is run in float64 on a twin with a random weight and
    compared. It may look at nothing that ``plain`` lacks, since that could change what it computes later, and change
    nothing.
    """
    own = list(_own_functions(type(module), plain))
    if not own:
        return True
    if (
        plain not in (nn.Linear, nn.Conv1d, nn.Conv2d)
        or any(map(_takes_more, own))
        or "weight" not in module._parameters
    ):
        return False
    standard = {*dir(plain), *vars(_smallest(plain)), "weight", "bias"} - {"training"}
    held = {*vars(module), *module._parameters, *module._buffers, *module._modules, *dir(type(module))}
    if any((held - standard).intersection(_names(function)) for function in own):
        return False
    twin = _twin(module)
    before = dict(vars(twin))
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    weight, bias = module.weight, module._parameters["bias"]
    shape = tuple(weight.shape)  # type: ignore[arg-type]
    if plain is nn.Linear:
        shape = (min(shape[0], _ROWS), shape[1])
        before["out_features"] = twin.out_features = shape[0]
        x = draw(2, 3, shape[1])
    else:
        reaches = (d * (k - 1) + 4 for d, k in zip(module.dilation, module.kernel_size, strict=True))  # type: ignore[arg-type]
        x = draw(2, module.in_channels, *reaches)  # type: ignore[arg-type]
    twin._parameters["weight"] = nn.Parameter(draw(*shape))
    twin._parameters["bias"] = None if bias is None else nn.Parameter(draw(shape[0]))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            y = type(module).forward(twin, x.clone())
            expected = _plain_result(plain, twin, x)
    except Exception:  # whatever a forward raises that is not the plain product of any input
        return False
    if type(y) is not torch.Tensor or y.dtype != x.dtype or y.shape != expected.shape or vars(twin) != before:
        return False
    return bool((y - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _own_functions(kind: type[nn.Module], plain: type[nn.Module]) -> Iterator[Callable[..., Any]]:
    """The methods of ``plain`` that compute its result, where ``kind`` has others."""
    for name in ("forward", "_conv_forward"):
        found = getattr(kind, name, None)
        if found is not None and found is not getattr(plain, name):
            yield found


def _takes_more(function: Callable[..., Any]) -> bool:
    """Whether a ``forward`` takes another argument than its input."""
    return function.__name__ == "forward" and len(inspect.signature(function).parameters) != 2


def _names(function: Callable[..., Any]) -> set[str]:
    """Names of attributes and globals in the code of ``function`` and of what it wraps."""
    found: set[str] = set()
    for each in (function, inspect.unwrap(function)):
        code = getattr(each, "__code__", None)
        found.update(() if code is None else code.co_names)
    return found


def _smallest(plain: Any) -> nn.Module:
    """An instance of ``plain``, for the names it holds."""
    sizes = {name: 1 for name in inspect.signature(plain).parameters if name.endswith(("features", "channels", "size"))}
    smallest: nn.Module = plain(**sizes, device="meta")
    return smallest


def _twin(module: nn.Module) -> Any:
    """An object like ``module`` whose attributes and parameters can be set without changing it."""
    twin: Any = object.__new__(type(module))
    vars(twin).update(
        {name: value.copy() if isinstance(value, dict) else value for name, value in vars(module).items()}
    )
    return twin


def _plain_result(plain: Any, twin: Any, x: torch.Tensor) -> torch.Tensor:
    if plain is nn.Linear:
        return F.linear(x, twin.weight, twin.bias)
    result: torch.Tensor = plain._conv_forward(twin, x, twin.weight, twin.bias)
    return result
