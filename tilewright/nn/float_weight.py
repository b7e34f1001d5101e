"""``layer.weight`` of a drop-in module: the float weight, made of what the module stores when somebody needs it.

Model code reads and writes the weights of its layers: it casts inputs to their dtype, multiplies with them instead of
calling the layer, merges adapters into them. ``FloatWeight`` is what such code gets. Dtype, shape and device cost
nothing; an operator gets the dequantised weight; what it writes in place, into a view too, goes back into the layer,
quantised anew. In a compiled or exported graph ``layer.weight`` is the dequantised weight itself, a value.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from tilewright.kernels.dispatch.packed import invalidate
from tilewright.kernels.dispatch.same import SameTensors, version_of


class Owner(Protocol):
    """What is asked of the layer whose weight it is; see ``WeightHolder``, which every drop-in layer is."""

    def _title(self) -> str: ...

    def _weight_size(self) -> tuple[int, ...]: ...

    def _weight_dtype(self, stored: dict[str, torch.Tensor]) -> torch.dtype: ...

    def _decoded(self, stored: dict[str, torch.Tensor]) -> torch.Tensor: ...

    def _encoded(self, weight: torch.Tensor, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...


class Stored:
    """What holds the weight of one layer, by name.

    Of all float weights that are made, the last alone is kept, and no longer than somebody holds the ``FloatWeight`` it
    was made for: a loop over the rows of one weight dequantises it once, one over the layers of a model has memory for
    one.
    """

    __slots__ = ("__weakref__", "_made", "owner", "tensors")

    def __init__(self, owner: Owner, tensors: dict[str, torch.Tensor]):
        self.owner, self.tensors = owner, tensors
        self._made: Made | None = None

    def is_that_of(self, other: Stored) -> bool:
        """Whether a write into one is a write into the other."""
        return list(map(id, self.tensors.values())) == list(map(id, other.tensors.values()))

    def made(self) -> Made:
        """The float weight as it is now."""
        global _last
        if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
            return Made(self)  # perhaps of tensors that mean nothing elsewhere
        made = self._made
        if made is None:
            made = Made(self)
            if made.value.requires_grad:  # part of a graph that may be gone by the next time
                return made
            if (before := _last()) is not None:
                before._made = None
            self._made, _last = made, weakref.ref(self)
        made.refresh()
        return made


class Made:
    """The float weight that was made of what is stored, in memory that views of it share."""

    def __init__(self, stored: Stored):
        self.stored = stored
        self.value = self._decode()
        #: Whether nobody has made something else of ``value`` than a weight of this layer.
        self.usable = True
        self._same = self._now()

    @property
    def is_ordinary(self) -> bool:
        """Whether a view of it may be used later: not where it is no real tensor, as in a transformation."""
        return type(self.value) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(self.value)

    def _decode(self) -> torch.Tensor:
        tensors = self.stored.tensors
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
            return self.stored.owner._decoded(tensors)
        with torch.inference_mode(False), torch.no_grad():  # so that writes into it are counted
            return self.stored.owner._decoded(tensors)

    def _now(self) -> SameTensors | None:
        held = list(self.stored.tensors.values())
        return SameTensors(held) if all(version_of(tensor) >= 0 for tensor in held) else None

    def refresh(self) -> None:
        """Make it anew, in place, if what is stored has changed since, or may have. Raises RuntimeError where that
        cannot be.
        """
        if self.usable and self._same is not None and self._same.match(list(self.stored.tensors.values())):
            return
        if not self.usable or self.value.requires_grad:
            raise RuntimeError(f"{self.stored.owner._title()} has changed since it was read: read it anew")
        with torch.inference_mode(False), torch.no_grad():
            self.value.copy_(self.stored.owner._decoded(self.stored.tensors))
        self._same = self._now()

    def write(self, differentiated: bool) -> None:
        """Store what somebody has written into it. differentiated: as part of a graph."""
        owner = self.stored.owner
        if differentiated:
            raise RuntimeError(
                f"what is written into {owner._title()} is stored in another form, which would lose "
                "its gradient: write under torch.no_grad(), or detach it"
            )
        if not self.usable:
            raise RuntimeError(f"{owner._title()} keeps its size and its memory: use copy_")
        for name, new in owner._encoded(self.value, self.stored.tensors).items():
            overwrite(self.stored.tensors[name], new)

    def discard(self) -> None:
        """Make it anew next time: what was written is not stored to the bit."""
        self._same = None
        self.usable = self.usable and not self.value.requires_grad
        if self.stored._made is self:
            self.stored._made = None


def _nothing() -> Stored | None:
    return None


_META = torch.device("meta")
#: Finds the ``Stored`` whose float weight is kept.
_last: Callable[[], Stored | None] = _nothing


def overwrite(tensor: torch.Tensor, new: torch.Tensor) -> None:
    """Write ``new`` into ``tensor`` such that whoever remembers something of it sees that."""
    if tensor is new:
        return
    inference = tensor.is_inference()
    with torch.inference_mode(inference), torch.no_grad():
        tensor.copy_(new)
    if inference:  # which no version counts
        invalidate(tensor)


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
