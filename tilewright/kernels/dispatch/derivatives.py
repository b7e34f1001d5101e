"""Derivatives of what rounds: the values of one function, the derivatives of another.

An operator's derivatives are those of ``Card.smooth``, plain PyTorch in float32 or float64 that leaves the rounding of
activations out (the straight-through estimator, Bengio et al. 2013). In an ordinary backward pass hand-written
gradients say the same faster. Everything else goes this way, for every mode, order and nesting at once:

    y = op(x) - (f(x).detach() - f(x))

with op at detached arguments. The bracket is 0 to the bit, so values are the operator's own, and whatever
differentiates y differentiates f. Where f is not finite, and so the bracket NaN, it counts as the constant 0.

``torch.vmap`` folds its dimension into that of rows or images where samples do not meet in them, and else goes sample
by sample.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

#: (arguments by name, dimensions of the batch by name, its size) -> arguments of one call for all samples, and what
#: makes the batch the first dimension of a result; None where there is no such call.
Fold = Callable[[Mapping[str, Any], Mapping[str, int], int], "tuple[dict[str, Any], Callable[[Any], Any]] | None"]

# Both are private to PyTorch.
_knows_transforms = hasattr(torch._C, "_functorch") and hasattr(torch._C._functorch, "peek_interpreter_stack")
_knows_levels = hasattr(forward_ad, "_current_level")
if not (_knows_transforms and _knows_levels):
    logging.getLogger("tilewright").warning(
        "PyTorch %s does not say whether a transformation of torch.func or a level of forward-mode AD is active: every "
        "call counts as one inside of such, which is right, and slower",
        torch.__version__,
    )


def is_transformed() -> bool:
    """Whether a transformation of ``torch.func`` or a level of forward-mode AD is active. Dynamo can trace it."""
    if not (_knows_transforms and _knows_levels):
        return True
    return _in_functorch() or forward_ad._current_level >= 0


def _in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# Dynamo traces the answer wrongly. It is asked for once, while the transformations are as in the call, and Dynamo
# guards on them itself. What ``torch.compiler.assume_constant_result`` does, without importing a compiler.
_in_functorch._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_differentiated(*tensors: Any) -> bool:
    """Whether somebody may ask for derivatives of what is computed of ``tensors``, in any mode."""
    if is_transformed():
        return True
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def is_tracked(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the innermost transformation, or autograd where there is none, may differentiate by ``tensors``."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    innermost = torch._C._functorch.peek_interpreter_stack() if _knows_transforms else None
    if innermost is not None:
        return bool(innermost.key() == torch._C._functorch.TransformType.Jvp)
    return has_tangent(tensors)


def has_tangent(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether one of ``tensors`` is dual, outside of ``torch.func``."""
    # A graph that is traced enters its level behind Python's back. Elsewhere nobody is asked who need not be: what
    # tells of tangents is an operator itself, which modes would see and cannot execute.
    if _knows_levels and forward_ad._current_level < 0 and not any(type(t) is FunctionalTensor for t in tensors):
        return False
    return any(t.is_floating_point() and forward_ad.unpack_dual(t, level=0).tangent is not None for t in tensors)


def detached(tree: Any) -> Any:
    """All tensors of ``tree`` as constants to every transformation."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, tree)


def joined(value: Any, smooth: Any) -> Any:
    """The values of ``value`` with the derivatives of ``smooth``; both are tensors or like trees of them.

    What is no float tensor has no derivative.
    """
    values, structure = pytree.tree_flatten(value)
    pairs = zip(values, pytree.tree_leaves(smooth, is_leaf=lambda leaf: leaf is None), strict=True)
    return pytree.tree_unflatten([_joined(*pair) for pair in pairs], structure)


def _joined(value: Any, smooth: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    if smooth is None or not value.is_floating_point():
        return value
    nothing = torch.nan_to_num(smooth.detach() - smooth, nan=0.0)
    return value - nothing.to(value.dtype)  # not the sum with its opposite: -0.0 + 0.0 is 0.0


def straight_through(value: Callable[..., Any], smooth: Callable[..., Any], *inputs: Any) -> Any:
    """``value(*inputs)`` with the derivatives of ``smooth(*inputs)``: for layers of several operators."""
    return joined(without_graph(value, *detached(inputs)), smooth(*inputs))


def without_graph(function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``, of whose derivatives nothing will be used."""
    if is_transformed():  # without gradients, some of PyTorch's operators lack nested forward derivatives
        return function(*inputs)
    with torch.no_grad():
        return function(*inputs)


def wide(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a smooth function of ``x`` computes."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- vmap
def fold_rows(*names: str) -> Fold:
    """For operators on rows: the batch becomes the first of the leading dimensions of arguments called ``names``."""

    def fold(arguments: Mapping[str, Any], dims: Mapping[str, int], size: int) -> Any:
        if not dims.keys() <= set(names):
            return None
        given = {name: _in_front(arguments.get(name), dims.get(name), size) for name in names if name in arguments}
        return {**arguments, **given}, lambda y: y

    return fold


def fold_images(*names: str) -> Fold:
    """For operators on [N, C, H, W]: the batch becomes part of N in the arguments called ``names``."""
    rows = fold_rows(*names)

    def fold(arguments: Mapping[str, Any], dims: Mapping[str, int], size: int) -> Any:
        moved = rows(arguments, dims, size)
        if moved is None:
            return None
        given = moved[0]
        flat = {name: t.flatten(0, 1) for name in names if (t := given.get(name)) is not None}
        return {**given, **flat}, lambda y: y.unflatten(0, (size, y.shape[0] // size))

    return fold


def _in_front(tensor: torch.Tensor | None, dim: int | None, size: int) -> torch.Tensor | None:
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def batched(
    call: Callable[..., Any], fold: Fold | None, arguments: Mapping[str, Any], dims: Mapping[str, int], size: int
) -> tuple[Any, Any]:
    """What ``torch.library.register_vmap`` asks for: results and the dimensions of the batch in them.

    call: the operator, of its arguments by name. dims: of the arguments that have a batch.
    """
    together = None if fold is None or not size else fold(arguments, dims, size)
    if together is not None:
        given, unfolded = together
        result = pytree.tree_map_only(torch.Tensor, unfolded, call(**given))
    else:
        if not size:
            raise RuntimeError("vmap over no samples: what their result would be like is not known")
        samples = [
            call(**{**arguments, **{name: arguments[name].select(dim, i) for name, dim in dims.items()}})
            for i in range(size)
        ]
        result = pytree.tree_map(lambda *each: torch.stack(each), *samples)
    return result, pytree.tree_map(lambda _: 0, result)
