"""Drop-in linear layers over a ``WeightFormat``: how they are made, called, cast and loaded, once for all."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.compiler import is_compiling

from tilewright.kernels.activation import check_activation
from tilewright.kernels.checks import check_vector
from tilewright.kernels.cpu import kept
from tilewright.kernels.dispatch.layers import invalidate as invalidate_calls
from tilewright.kernels.dispatch.layers import prepared_call, repeated_call
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.dispatch.router import route
from tilewright.kernels.formats.int8 import check_weight
from tilewright.kernels.formats.weight import Spec, WeightFormat
from tilewright.nn.nested import on_rows
from tilewright.nn.taken_over import TakesActivation
from tilewright.nn.weight_holder import WeightHolder, stored_name

Layer = TypeVar("Layer", bound="QuantizedLinear")
#: ``kept_bytes`` asks about batches below two to this power.
_MOST_ROWS = 14


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """``torch.bfloat16`` -> "bfloat16"."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The reverse of ``dtype_name``; dtypes pass through. Raises ValueError for a name that is no float dtype."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{dtype!r} is not the name of a float dtype")
    return found


def resolve_compute_dtype(compute_dtype: torch.dtype | str | None, weight_dtype: torch.dtype) -> torch.dtype | None:
    """Turn "auto" into a dtype: bfloat16 for float32 weights, where 16-bit products are what makes the layer fast,
    else None.
    """
    if compute_dtype == "auto":
        return torch.bfloat16 if weight_dtype == torch.float32 else None
    return parse_dtype(compute_dtype)


class QuantizedLinear(TakesActivation, WeightHolder):
    """Base of the drop-in replacements of ``nn.Linear``: y = activation(x W^T + b) + residual with a quantised W.

    The weight and its scales are buffers in the canonical format, the bias is a parameter. Scales keep their dtype
    under ``.to(dtype)`` and ``.half()``: rounding them would change the weight. ``dtype`` is that of the layer this one
    stands for; it follows ``.to(dtype)`` and is what ``to_float`` returns.

    A subclass that names its operator and format, and the options it has, is complete, and checkpoints may hold it.
    Options that this class knows:

    channel_scale: float32 [in_features] or None multiplies the input before it is quantised; the weight holds its
    inverse (SmoothQuant, Xiao et al. 2023), so that channels with outliers do not take the resolution of all others.
    The constructor only asks whether there is one.

    compute_dtype: what activations and dequantised weights are rounded to for the product, or less where that takes no
    longer; None: the input's dtype.
    ``from_float`` makes of "auto" bfloat16 for a float32 layer, else None.

    keep_dequantized: on a CPU, hold the weight dequantised as well and multiply many rows with that where the float
    library is faster. ``kept_bytes`` is what it takes, on top of the compact weight, which calls with few rows read. It
    is made when a call first wants it, follows what is written into the weight, and is never saved or copied.
    """

    #: Options of ``from_float`` beyond ``activation`` that the constructor lacks, or has another default for.
    from_float_options: ClassVar[dict[str, Any]] = {}

    #: What the layer calls the operator's arguments after x, by place, and by name alone; those by their own names.
    _placed: ClassVar[tuple[str, ...]] = ()
    _named: ClassVar[tuple[str, ...]] = ()
    _by_name: ClassVar[dict[str, str]] = {}

    bias: nn.Parameter | None
    weight_scale: torch.Tensor
    channel_scale: torch.Tensor | None
    compute_dtype: torch.dtype | None
    keep_dequantized: bool = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if cls.base_format is not None:
            cls.range_search = cls.from_float_options.get("range_search", cls.range_search)
        if "op_name" not in vars(cls):
            return
        declared = getattr(torch.ops.tilewright, cls.op_name).default._schema.arguments[1:]
        cls._placed = tuple(stored_name(each.name) for each in declared if not each.kwarg_only)
        cls._named = tuple(each.name for each in declared if each.kwarg_only)
        cls._by_name = {each.name: stored_name(each.name) for each in declared if each.name != "residual"}
        if "from_float" not in vars(cls):
            cls.from_float = _from_float_of(cls)  # type: ignore[method-assign]
        if cls.forward is QuantizedLinear.forward:
            # torch.compile keeps what it made with the code, and of one code only so much: each kind needs its own.
            code = cls.forward.__code__.replace()
            cls.forward = types.FunctionType(code, globals(), "forward", cls.forward.__defaults__)  # type: ignore[method-assign]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str = "none",
        origin: str = "Linear",
        range_search: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        **options: Any,
    ):
        super().__init__()
        options = _completed(f"{type(self).__name__}.__init__", options, self.options)
        check_activation(activation)
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.origin = origin
        self.layer_name = ""
        self._search(range_search)
        self.dtype = parse_dtype(dtype) or torch.get_default_dtype()
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=self.dtype))
        else:
            self.register_parameter("bias", None)
        options = {name: parse_dtype(o) if name.endswith("dtype") else o for name, o in options.items()}
        if "compute_dtype" in options:
            self.compute_dtype = options["compute_dtype"]
        if "keep_dequantized" in options:
            if not isinstance(options["keep_dequantized"], bool):
                raise TypeError(f"keep_dequantized is True or False, not {options['keep_dequantized']!r}")
            self.keep_dequantized = options["keep_dequantized"]
        if self.base_format is not None:
            weight_format = self.base_format.for_layer(in_features, self.dtype, options)
            for name, fact in weight_format.facts(in_features).items():
                if not isinstance(fact, torch.dtype):  # which the tensors tell
                    setattr(self, name, fact)
            specs = weight_format.operands(out_features, in_features)
            for name in self.base_format.names:
                self.register_buffer(stored_name(name), specs[name].empty(device) if name in specs else None)
        if "channel_scale" in options:
            scale = Spec((in_features,), torch.float32)
            self.register_buffer("channel_scale", scale.empty(device) if options["channel_scale"] else None)

    @classmethod
    def from_float(cls: type[Layer], linear: nn.Linear, *, activation: str = "none", **options: Any) -> Layer:
        """The quantised twin of ``linear``, sharing its bias.

        options: those of the class, and of these what it has: range_search: "minmax" or "mse". importance: weights of
        the squared errors for "mse", float [in_features]. channel_scale: positive float [in_features]. mask: bool
        [out_features, in_features], what is kept; without one a weight that is 2:4 stays as it is, and of any other
        the larger two of every four are kept. weight: what to keep values of instead of ``linear.weight``, for pruning
        that changes those that stay. Raises TypeError and ValueError for bad options and for a weight that is not
        finite.
        """
        options = _completed(f"{cls.__name__}.from_float", options, {**cls.options, **cls.from_float_options})
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"from_float takes an nn.Linear, not {type(linear).__name__}")
        weight, channel_scale = linear.weight, options.get("channel_scale")
        check_vector(cls.__name__, "channel_scale", channel_scale, linear.in_features)
        if options.get("weight") is not None:
            weight = options["weight"]
            check_weight(weight)
        own = {name: options[name] for name in cls.options}
        for name in {"compute_dtype", "values_dtype"} & own.keys():
            own[name] = resolve_compute_dtype(own[name], linear.weight.dtype)
        if "channel_scale" in own:
            own["channel_scale"] = channel_scale is not None
        own["range_search"] = options.get("range_search")
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        module = cls(*sizes, activation=activation, device="meta", dtype=linear.weight.dtype, **own)
        weight = weight.detach()
        if channel_scale is not None:
            module.channel_scale = channel_scale.detach().to(weight.device, torch.float32)
            weight = weight.float() / module.channel_scale
        how = {name: options[name] for name in ("range_search", "importance", "mask") if name in options}
        for name, operand in module.weight_format.quantize(weight, **how).items():
            setattr(module, stored_name(name), operand)
        module.bias = linear.bias
        return module.train(linear.training)

    # ---- public
    @property
    def weight_format(self) -> WeightFormat:
        """How the weight is stored."""
        return self._operands_of(self._held_weight())[0]

    def dequantize_weight(self) -> torch.Tensor:
        """The weight as float32 [out_features, in_features], the channel scale taken back."""
        return self._matrix(self._held_weight())

    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON. An activation that was a module of the model is not
        among them.
        """
        own = {name: self._option(name) for name in self.options if name != "keep_dequantized"}
        if self.keep_dequantized:  # a config from before there was such a thing says the same as one without
            own["keep_dequantized"] = True
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "activation": "none" if self.fused_activation else self.activation,
            "origin": self.origin,
            "dtype": dtype_name(self.dtype),
            **{name: dtype_name(value) if name.endswith("dtype") else value for name, value in own.items()},
            **self._search_config(),
        }

    def _option(self, name: str) -> Any:
        """The value of an option of the constructor."""
        if name == "channel_scale":
            return self.channel_scale is not None
        told_by = {"scale_dtype": "weight_scale", "values_dtype": "weight_values"}
        return self.get_buffer(told_by[name]).dtype if name in told_by else getattr(self, name)

    def to_float(self) -> nn.Linear:
        """An ``nn.Linear`` with the dequantised weight in ``dtype``. Raises ValueError if an activation is fused in."""
        if self.activation != "none":
            raise ValueError(f"{self._label()} ends in {self.activation}, which nn.Linear cannot")
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.dtype)
        linear.weight = nn.Parameter(self.dequantize_weight().to(self.dtype))
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def problem(self, m: int = 1, dtype: torch.dtype | None = None) -> Problem:
        """What the router is asked for ``m`` rows of activations of ``dtype`` (default: the layer's)."""
        return Problem(
            op=self.op_name,
            m=m,
            n=self.out_features,
            k=self.in_features,
            x_dtype=dtype or self.dtype,
            activation=self.activation,
            bias=self.bias is not None,
            compute_dtype=getattr(self, "compute_dtype", None),
            keep_dequantized=self.keep_dequantized,
            **self.weight_format.facts(self.in_features),
            **device_facts(self.device),
        )

    def kept_bytes(self) -> int:
        """Bytes that the dequantised weight takes beside the compact one once calls with many rows have come: 0 where
        ``keep_dequantized`` was not asked for, or where no call would use it.
        """
        if not self.keep_dequantized or self.device.type != "cpu":
            return 0
        held = kept.held_dtype(self.dtype, getattr(self, "compute_dtype", None))
        used = any(route(self.problem(1 << power)).name == kept.NAME for power in range(_MOST_ROWS))
        return self.out_features * self.in_features * held.itemsize if held is not None and used else 0

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """[out_features, in_features], however the weight is packed."""
        return self.out_features, self.in_features

    def extra_repr(self) -> str:
        """Sizes first, as ``nn.Linear`` prints them, then what is special."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        if self.activation != "none":
            text += f", activation={self.activation}"
        if self.keep_dequantized:
            text += ", keep_dequantized=True"
        displayed = [name for name in ("group_size", "symmetric", "values_dtype") if name in self.options]
        return ", ".join([text, *(f"{name.removesuffix('_dtype')}={self.config()[name]}" for name in displayed)])

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """input float [..., in_features], residual [..., out_features] -> input.dtype [..., out_features]."""
        x = input
        if residual is None and not is_compiling():  # asked here, so that nothing of what follows is compiled
            y = repeated_call(self.__dict__, x)
            if y is not None:  # for a call like one before
                return y
        if x.is_nested:
            return on_rows(self, x, residual)
        call = None if residual is not None else self._prepared_call(x)
        if call is not None:  # for inputs of this shape and dtype, which were checked before
            return call(x)
        self._check_input(x)
        held = self._buffers  # asked first: nn.Module takes long to find a buffer
        placed = [
            held[name] if name in held else residual if name == "residual" else getattr(self, name)
            for name in self._placed
        ]
        named = {name: getattr(self, name) for name in self._named}
        found: torch.Tensor = getattr(torch.ops.tilewright, self.op_name)(x, *placed, **named)
        return found

    # ---- internal
    def _check_input(self, x: torch.Tensor) -> None:
        self._check_layout(x)
        if not x.is_floating_point():
            raise TypeError(f"{self._label()} takes float input, not {x.dtype}")
        if not x.dim() or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{self._label()} takes input whose last dimension is {self.in_features}, "
                f"not input of shape {list(x.shape)}"
            )

    def _prepared_call(self, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What serves a call on ``x`` without a residual, or None: then the operator is to be called."""
        if is_compiling():
            return None
        return prepared_call(self, x, [*map(self._buffers.get, self._held_names), self._parameters["bias"]])

    def _arguments(self) -> dict[str, Any]:
        """Of the operator, without x and the residual."""
        return {name: getattr(self, held) for name, held in self._by_name.items()}

    def _weight_size(self) -> tuple[int, ...]:
        sizes = self.out_features, self.in_features
        return sizes[::-1] if self.origin == "Conv1D" else sizes

    def _columns(self) -> int:
        return self.in_features

    def _matrix_of(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t() if self.origin == "Conv1D" else weight

    def _weight_of(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.t().contiguous() if self.origin == "Conv1D" else matrix

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)
        invalidate_calls(self)
        return self


def _completed(function: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments with their defaults. Raises TypeError for one that ``function`` does not have."""
    for name in given:
        if name not in defaults:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return {**defaults, **given}


def _from_float_of(cls: type[QuantizedLinear]) -> Any:
    """``from_float`` with the signature that it has for ``cls``."""

    def from_float(kind: Any, /, linear: nn.Linear, **options: Any) -> Any:
        return super(cls, kind).from_float(linear, **options)

    inherited = QuantizedLinear.from_float.__func__  # type: ignore[attr-defined]
    signature = inspect.signature(inherited)
    first, linear, activation, _ = signature.parameters.values()
    defaults = {**cls.options, **cls.from_float_options}
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name]) for name in defaults]
    shown = signature.replace(parameters=[first, linear, *own, activation])
    from_float.__doc__, from_float.__signature__ = inherited.__doc__, shown  # type: ignore[attr-defined]
    return classmethod(from_float)
