"""``layer.weight`` of a drop-in module: the float weight, made of what the module stores when somebody needs it.

Model code reads and writes the weights of its layers: it casts inputs to their dtype, multiplies with them instead of
calling the layer, merges adapters into them. ``FloatWeight`` is what such code gets. Dtype, shape and device cost
nothing; an operator gets the dequantised weight; what it writes in place, into a view too, goes back into the layer,
quantised anew. In a compiled or exported graph ``layer.weight`` is the dequantised weight itself, a value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tilewright.kernels.dispatch.same import version_of
from tilewright.nn.stored_weight import Made, Owner, Stored

_META = torch.device("meta")


class LinkedWeight(torch.Tensor):
    """What ``FloatWeight`` and its views share. Copies (``clone``, ``deepcopy``, pickled) are plain tensors."""

    def _source(self) -> Stored:
        raise NotImplementedError

    def _now(self) -> tuple[Made, torch.Tensor]:
        """The float weight, and the part of it that this one stands for, as a plain tensor."""
        raise NotImplementedError

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        raise self._why_no_parameter()

    def _why_no_parameter(self) -> RuntimeError:
        stored = self._source()
        return RuntimeError(
            f"{stored.owner._title()} is made of what the layer stores ({', '.join(stored.tensors)}) and "
            "can be no parameter: make one of its clone(), or give the plain layer back with tw.revert_model"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """A plain tensor."""
        memo[id(self)] = copied = self._now()[1].detach().clone()
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a plain tensor."""
        return self._now()[1].detach().clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Computed of the float weight, but for metadata and for what has a meaning of its own."""
        named = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **named)
        first = args[0] if args else None
        special = _OF_WEIGHTS.get(func) if isinstance(first, FloatWeight) else None
        if special is None and isinstance(first, LinkedWeight):
            special = _OF_ALL.get(func)
        return _compute(func, args, named) if special is None else special(*args, **named)


class FloatWeight(LinkedWeight):
    """The weight of a layer. It has no memory; to code that asks behind our back it is on the meta device, so that
    nobody takes an address from it.
    """

    _stored: Stored
    _pinned: Made | None

    def __new__(cls, stored: Stored) -> FloatWeight:
        """``layer.weight`` makes them."""
        size, dtype = stored.owner._weight_size(), stored.owner._weight_dtype(stored.tensors)
        made: FloatWeight = torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=_META)
        made._stored, made._pinned = stored, None
        return made

    def _source(self) -> Stored:
        return self._stored

    def _now(self) -> tuple[Made, torch.Tensor]:
        if self._pinned is not None and self._pinned.usable:
            self._pinned.refresh()
            return self._pinned, self._pinned.value
        made = self._stored.made()
        return made, made.value

    def _first(self) -> torch.Tensor:
        """One of the tensors that are stored: all are on one device."""
        return next(iter(self._stored.tensors.values()))

    def _parameter(self) -> torch.Tensor | None:
        """The parameter that it is a form of, if the layer has its weight in float."""
        first = self._first()
        return first if isinstance(first, torch.nn.Parameter) else None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """For those who have switched ``__torch_function__`` off."""
        return _compute(func, args, kwargs or {})


class FloatWeightView(LinkedWeight):
    """A view of the float weight of a layer, in memory that holds the dequantised values."""

    _made: Made

    def _source(self) -> Stored:
        return self._made.stored

    def _now(self) -> tuple[Made, torch.Tensor]:
        self._made.refresh()
        with torch._C.DisableTorchFunctionSubclass():
            return self._made, self.as_subclass(torch.Tensor)


def _view(tensor: torch.Tensor, made: Made) -> FloatWeightView:
    view = tensor.as_subclass(FloatWeightView)
    view._made = made
    return view


def _compute(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``func`` of the float weights. What it wrote into one is stored, and what is a view of one stays so."""
    given: dict[int, tuple[LinkedWeight, Made, torch.Tensor, int, Any]] = {}

    def plain(weight: LinkedWeight) -> torch.Tensor:
        made, tensor = weight._now()
        given[id(tensor)] = weight, made, tensor, version_of(tensor), _place(tensor)
        return tensor

    args, kwargs = pytree.tree_map_only(LinkedWeight, plain, (args, dict(kwargs)))
    mutated = _mutated(func, args, kwargs)
    try:
        result = func(*args, **kwargs)
    finally:
        written: dict[Made, bool] = {}
        for _, made, tensor, version, place in given.values():
            moved = _place(tensor) != place
            if moved or id(tensor) in mutated or version_of(tensor) != version:
                made.usable = made.usable and not moved
                made.discard()
                written[made] = written.get(made, False) or tensor.requires_grad
    for made, differentiated in written.items():
        made.write(differentiated)
    memory = {number: made for _, made, tensor, *_ in given.values() if (number := _memory_of(tensor)) is not None}

    def handed_out(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in given:
            return given[id(tensor)][0]
        number = _memory_of(tensor)
        made = None if number is None else memory.get(number)
        return tensor if made is None or not made.is_ordinary else _view(tensor, made)

    return pytree.tree_map_only(torch.Tensor, handed_out, result)


def _memory_of(tensor: torch.Tensor) -> int | None:
    """A number for the storage; None for tensors that have none, as inside of ``torch.func``'s transformations."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return _memory_of(tensor), tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _mutated(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[int]:
    """Numbers of the tensors that an operator's schema says it writes into: below autograd no version counts that."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return set()
    given = {**kwargs, **dict(zip((argument.name for argument in schema.arguments), args, strict=False))}
    names = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    return {id(leaf) for leaf in pytree.tree_leaves([given.get(name) for name in names])}


# ---- what is not computed of the float weight
def check_like(owner: Owner, new: object, weight: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless ``new`` may take the place of ``weight``."""
    name = owner._title()
    if not isinstance(new, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(new).__name__}")
    if new.dtype != weight.dtype:
        raise TypeError(f"{name} is {weight.dtype}, not {new.dtype}: cast it first, or use copy_, which does")
    if new.device != weight.device:
        raise ValueError(f"{name} is on {weight.device}, not on {new.device}: move it there first")
    if new.shape != weight.shape:
        raise ValueError(f"{name} must have shape {list(weight.shape)}, not {list(new.shape)}")


def _set_data(weight: LinkedWeight, data: torch.Tensor) -> None:
    source = weight._source()
    if isinstance(data, LinkedWeight) and data._source().is_that_of(source) and _place(data)[1:] == _place(weight)[1:]:
        return  # the end of ``weight.data += x``, which has written x already
    check_like(source.owner, data, weight)
    with torch.no_grad():
        weight.copy_(data)


def _set_requires_grad(weight: LinkedWeight, requires_grad: bool = True) -> LinkedWeight:
    parameter = weight._parameter() if isinstance(weight, FloatWeight) else None
    if parameter is not None:
        parameter.requires_grad_(requires_grad)
    elif requires_grad and not weight.requires_grad:
        raise weight._why_no_parameter()
    return weight


def _numpy(weight: LinkedWeight, *args: Any, **kwargs: Any) -> Any:
    array = _pinned(weight).detach().numpy(*args, **kwargs)
    array.flags.writeable = False  # nobody would see what is written there
    return array


def _array(weight: LinkedWeight, *args: Any, **kwargs: Any) -> Any:
    return _numpy(weight).__array__(*args, **kwargs)


def _pinned(weight: LinkedWeight) -> torch.Tensor:
    """A plain tensor in memory that stays where it is as long as ``weight`` lives."""
    made, tensor = weight._now()
    if isinstance(weight, FloatWeight):
        weight._pinned = made
    return tensor


def _of_memory(func: Any) -> Callable[..., Any]:
    return lambda weight, *args, **kwargs: func(_pinned(weight), *args, **kwargs)


def _of_stored(func: Any) -> Callable[..., Any]:
    """``func``, which asks where a tensor is, of what is stored."""
    return lambda weight, *args, **kwargs: func(weight._first(), *args, **kwargs)


def _requires_grad(weight: FloatWeight) -> bool:
    parameter = weight._parameter()
    return parameter is not None and parameter.requires_grad


def _grad(weight: FloatWeight) -> torch.Tensor | None:
    parameter, stored = weight._parameter(), weight._stored
    if parameter is None or parameter.grad is None:
        return None
    return stored.owner._decoded(dict.fromkeys(stored.tensors, parameter.grad))


def _set_grad(weight: FloatWeight, grad: torch.Tensor | None = None) -> None:
    parameter, stored = weight._parameter(), weight._stored
    if parameter is not None:
        parameter.grad = None if grad is None else next(iter(stored.owner._encoded(grad, stored.tensors).values()))
    elif grad is not None:
        raise weight._why_no_parameter()


def _share_memory(weight: FloatWeight) -> FloatWeight:
    for tensor in weight._stored.tensors.values():
        tensor.share_memory_()
    return weight


_T: Any = torch.Tensor


def _getters(*names: str) -> list[Any]:
    return [getattr(_T, name).__get__ for name in names]


_METADATA = frozenset(
    [
        *_getters("dtype", "shape", "ndim", "layout", "itemsize", "nbytes"),
        *_getters("is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_mkldnn"),
        *(_T.dim, _T.ndimension, _T.size, _T.stride, _T.storage_offset, _T.numel, _T.nelement, _T.element_size),
        *(_T.is_floating_point, _T.is_complex, _T.is_contiguous, _T.__len__, _T.is_signed, _T.is_conj, _T.is_neg),
        *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_signed, torch.is_conj, torch.is_neg),
    ]
)
_OF_ALL: dict[Any, Callable[..., Any]] = {
    _T.data.__set__: _set_data,
    _T.requires_grad.__set__: _set_requires_grad,
    _T.requires_grad_: _set_requires_grad,
    _T.__iter__: lambda weight: iter(weight.unbind(0)),
    _T.numpy: _numpy,
    _T.__array__: _array,
}
_OF_WEIGHTS: dict[Any, Callable[..., Any]] = {
    **{f: _of_stored(f) for f in _getters("device", "is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu")},
    **{f: _of_stored(f) for f in (_T.get_device,)},
    **{f: _of_memory(f) for f in (_T.data_ptr, _T.untyped_storage, _T.storage, _T._typed_storage, _T.__dlpack__)},
    _T.requires_grad.__get__: _requires_grad,
    _T.is_leaf.__get__: lambda weight: True,
    _T.grad_fn.__get__: lambda weight: None,
    _T.grad.__get__: _grad,
    _T.grad.__set__: _set_grad,
    _T.grad.__delete__: _set_grad,
    _T._version.__get__: lambda weight: sum(version_of(tensor) for tensor in weight._stored.tensors.values()),
    _T.share_memory_: _share_memory,
    _T.is_shared: lambda weight: all(tensor.is_shared() for tensor in weight._stored.tensors.values()),
}
