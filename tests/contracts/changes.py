"""Ways to change the tensors of a module that has run: what nobody may go on to remember.

A change is given the module and the tensors to change, and leaves values that the module can still compute with, or
shapes that it must refuse. Writes through ``.data`` into memory that stays are not among them: nobody can see those.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

Tensors = list[torch.Tensor]
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def other_values(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor like ``tensor``, of values that may stand there: its rows the other way round, floats smaller."""
    turned = tensor.detach().flip(0) if tensor.dim() else tensor.detach().clone()
    return turned * 0.75 if tensor.is_floating_point() else turned


# ---- changes of one tensor
def data(tensor: torch.Tensor) -> None:
    """Other memory, and the old one is free."""
    tensor.data = other_values(tensor)


def data_again_and_again(tensor: torch.Tensor) -> None:
    """The last may lie where the first lay."""
    for _ in range(4):
        tensor.data = other_values(tensor)


def first_row_everywhere(tensor: torch.Tensor) -> None:
    """Same memory, address and shape, other strides."""
    if tensor.dim():
        tensor.data = tensor.data[:1].expand(tensor.shape)


def fewer_rows(tensor: torch.Tensor) -> None:
    """Same memory, address and strides, another shape."""
    if tensor.dim():
        tensor.data = tensor.data[:-1]


def other_shape(tensor: torch.Tensor) -> None:
    """Same memory and address, dimensions the other way round."""
    tensor.data = tensor.data.reshape(tensor.shape[::-1])


def other_dtype(tensor: torch.Tensor) -> None:
    """Same memory, address, shape and strides: float32 read as int32, int8 as uint8, and the other way round."""
    if tensor.requires_grad:  # PyTorch wants a float of the same size, which only half precision has
        return
    twins = {torch.float32: torch.int32, torch.bfloat16: torch.float16, torch.int8: torch.uint8}
    twins |= {twin: dtype for dtype, twin in twins.items()}
    tensor.data = tensor.data.view(twins[tensor.dtype])


def set_(tensor: torch.Tensor) -> None:
    """Counted as a write."""
    tensor.set_(other_values(tensor))


def resize_larger(tensor: torch.Tensor) -> None:
    """The storage moves, the tensor stays as it is."""
    tensor.data.resize_(4 * tensor.numel() + 1024)


def resize_storage_and_back(tensor: torch.Tensor) -> None:
    """Memory of the same size, perhaps at another address, filled anew."""
    kept, storage = other_values(tensor), tensor.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    tensor.copy_(kept)


def resize_smaller(tensor: torch.Tensor) -> None:
    """One row less, counted as a write. Of a parameter PyTorch refuses it, so of what the parameter holds."""
    if tensor.dim():
        smaller = tensor.detach().clone().resize_(len(tensor) - 1, *tensor.shape[1:])
        tensor.data = smaller


def swap(tensor: torch.Tensor) -> None:
    """Python's object stays, all behind it is another's."""
    new = other_values(tensor)
    torch.utils.swap_tensors(tensor, nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new)


def lerp_(tensor: torch.Tensor) -> None:
    """A moving average, in place."""
    if tensor.is_floating_point():
        tensor.lerp_(other_values(tensor), 0.5)
    else:
        tensor.copy_(other_values(tensor))


def share_memory_(tensor: torch.Tensor) -> None:
    """The storage moves."""
    tensor.share_memory_()


def share_and_write(tensor: torch.Tensor) -> None:
    """The storage moves, and what lies there now changes."""
    tensor.share_memory_()
    tensor.copy_(other_values(tensor))


OF_TENSORS: dict[str, Callable[[torch.Tensor], None]] = {
    each.__name__: each
    for each in (
        data,
        data_again_and_again,
        first_row_everywhere,
        fewer_rows,
        other_shape,
        other_dtype,
        set_,
        resize_larger,
        resize_storage_and_back,
        resize_smaller,
        swap,
        lerp_,
        share_memory_,
        share_and_write,
    )
}


# ---- changes of a module
def vector_to_parameters(module: nn.Module) -> None:
    """Twice: the second vector may lie where the first lay."""
    for _ in range(2 if list(module.parameters()) else 0):
        vector = nn.utils.parameters_to_vector(map(other_values, module.parameters()))
        nn.utils.vector_to_parameters(vector, module.parameters())


def optimizer_step(module: nn.Module) -> None:
    """Of the biases, and of weights that are parameters."""
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
        torch.optim.SGD([parameter], lr=1.0).step()


def fused_optimizer_step(module: nn.Module) -> None:
    """Which PyTorch 2.13.0 does not count as a write, so that whoever steps has to."""
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
        torch.optim.SGD([parameter], lr=1.0, fused=True).step()
        torch.autograd.graph.increment_version(parameter)


def load(module: nn.Module) -> None:
    """Into the memory that is there."""
    module.load_state_dict({name: other_values(tensor) for name, tensor in module.state_dict().items()})


def load_assign(module: nn.Module) -> None:
    """Other tensors."""
    state = {name: other_values(tensor) for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def load_swap(module: nn.Module) -> None:
    """By ``swap_tensors``."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        load(module)
        module.to(torch.bfloat16).to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def to_dtype(module: nn.Module) -> None:
    """There and back."""
    module.to(torch.bfloat16)
    module.to(torch.float32)


def to_device(module: nn.Module) -> None:
    """Off the device and back to it with other values; ``to_empty`` moves as ``.to`` does, from "meta" too."""
    state = {name: other_values(tensor) for name, tensor in module.state_dict().items()}
    module.to("meta")
    module.to_empty(device="cpu")
    module.load_state_dict(state)


def share(module: nn.Module) -> None:
    """All storages move."""
    module.share_memory()


def average(module: nn.Module) -> None:
    """Parameters and buffers follow those of another model, as ``AveragedModel`` has them."""
    if not list(module.parameters()):
        return
    averaged = AveragedModel(copy.deepcopy(module), use_buffers=False)
    averaged.module = module
    other = copy.deepcopy(module)
    load(other)
    averaged.update_parameters(other)
    averaged.update_parameters(other)


OF_MODULES: dict[str, Callable[[nn.Module], None]] = {
    each.__name__: each
    for each in (
        vector_to_parameters,
        optimizer_step,
        fused_optimizer_step,
        load,
        load_assign,
        load_swap,
        to_dtype,
        to_device,
        share,
        average,
    )
}
#: How a copy may be made in between.
COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),  # noqa: S301  (our own bytes)
}


# ---- what comes out
def garbage(sizes: list[int]) -> Tensors:
    """NaN wherever so many bytes were freed."""
    gc.collect()
    return [torch.full((max(1, size // 4),), torch.nan) for size in sizes for _ in range(8)]


def outcome(module: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
    """What a call returns, or the kind of error it raises."""
    try:
        return module(x).clone()
    except (RuntimeError, ValueError, TypeError) as error:
        return type(error)


def same(ours: Any, theirs: Any, exact: bool) -> bool:
    """Whether two outcomes are one. exact: to the bit, else but for the rounding of float32."""
    if isinstance(ours, type) or isinstance(theirs, type):
        return ours is theirs
    tolerance = 0.0 if exact else 1e-3
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, tolerance, tolerance, equal_nan=True)


def difference(ours: Any, theirs: Any) -> str:
    """In words."""
    if isinstance(ours, type) or isinstance(theirs, type) or ours.shape != theirs.shape:
        return f"{ours} is not {theirs}"
    return f"they differ by {(ours.double() - theirs.double()).abs().max().item()}"
