"""What the quantised linear modules share: attributes, casting rules, loading rules, errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from tilewright.kernels.activation import check_activation
from tilewright.kernels.dispatch.layers import invalidate as invalidate_calls
from tilewright.kernels.dispatch.layers import prepared_call
from tilewright.kernels.dispatch.packed import invalidate
from tilewright.kernels.dispatch.problem import Problem, device_facts


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


class QuantizedLinear(nn.Module):
    """Base of the drop-in replacements of ``nn.Linear``: y = activation(x W^T + b) + residual with a quantised W.

    The weight and its scales are buffers in the canonical format, the bias is a parameter. Scales keep their dtype
    under ``.to(dtype)`` and ``.half()``: rounding them would change the weight. ``dtype`` is that of the layer this one
    stands for; it follows ``.to(dtype)`` and is what ``to_float`` returns.
    """

    scheme_name: ClassVar[str]
    op_name: ClassVar[str]
    #: Buffers that must arrive with just this dtype when a state dict is loaded.
    _integer_buffers: ClassVar[tuple[str, ...]]
    _scale_buffers: ClassVar[tuple[str, ...]] = ("weight_scale", "channel_scale")

    #: Buffers that the operator reads, as it calls them.
    _operands: ClassVar[tuple[str, ...]] = ()

    bias: nn.Parameter | None
    weight_scale: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str = "none",
        origin: str = "Linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ):
        super().__init__()
        check_activation(activation)
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.origin = origin
        self.layer_name = ""
        self.dtype = parse_dtype(dtype) or torch.get_default_dtype()
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=self.dtype))
        else:
            self.register_parameter("bias", None)

    # ---- what subclasses provide
    def dequantize_weight(self) -> torch.Tensor:
        """The weight as float32 [out_features, in_features]."""
        raise NotImplementedError(f"{type(self).__name__}.dequantize_weight")

    def _facts(self) -> dict[str, Any]:
        """Fields of ``Problem`` that this kind of layer adds."""
        return {}

    def why_bad_buffer(self, name: str, value: torch.Tensor) -> str | None:
        """Why ``value``, of the right shape and dtype, cannot be the buffer called ``name``, or None."""
        return None

    # ---- public
    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "activation": self.activation,
            "origin": self.origin,
            "dtype": dtype_name(self.dtype),
        }

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
            **self._facts(),
            **device_facts(self.device),
        )

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight_scale.device

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """[out_features, in_features], however the weight is packed."""
        return self.out_features, self.in_features

    def weight_bytes(self) -> int:
        """Bytes of the quantised weight with its scales and zero points; without the bias."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    def extra_repr(self) -> str:
        """Sizes first, as ``nn.Linear`` prints them, then what is special."""
        displayed = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return displayed if self.activation == "none" else f"{displayed}, activation={self.activation}"

    # ---- internal
    def _label(self) -> str:
        return f"{type(self).__name__} {self.layer_name!r}" if self.layer_name else type(self).__name__

    def _check_input(self, x: torch.Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"{self._label()} takes float input, not {x.dtype}")
        if not x.dim() or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{self._label()} takes input whose last dimension is {self.in_features}, "
                f"not input of shape {list(x.shape)}"
            )

    def _prepared_call(self, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What serves a call on ``x`` without a residual, or None: then the operator is to be called."""
        if torch.compiler.is_compiling():  # asked here, so that nothing of what follows is compiled
            return None
        tensors = [self._buffers.get(name) for name in self._operands]
        tensors.append(self._parameters["bias"])
        return prepared_call(self, x, tensors, self.activation, self.problem, self._arguments)

    def _arguments(self) -> dict[str, Any]:
        """Of the operator, without x and the residual."""
        found = {name: self._buffers.get(name) for name in self._operands}
        return {**found, "bias": self.bias, "activation": self.activation}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        before = {name: self._buffers.get(name) for name in self._scale_buffers}
        super()._apply(fn, recurse)
        for name, scale in before.items():
            if scale is not None:
                after = self.get_buffer(name)
                if after.dtype != scale.dtype:
                    self._buffers[name] = scale.to(after.device)
        invalidate_calls(self)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in self._integer_buffers:
            given, own = state_dict.get(prefix + name), self._buffers.get(name)
            if given is not None and own is not None and given.dtype != own.dtype:
                # copy_ would truncate a float weight to integers without a word.
                error_msgs.append(
                    f"{prefix}{name} must be {own.dtype}, not {given.dtype}: "
                    f"this state dict is not of a {type(self).__name__}"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for buffer in self.buffers(recurse=False):
            if buffer.is_inference():
                invalidate(buffer)


def check_linear(linear: nn.Module) -> None:
    """Raise TypeError unless ``linear`` has what ``nn.Linear`` has."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"from_float takes an nn.Linear, not {type(linear).__name__}")


def common_options(linear: nn.Linear) -> dict[str, Any]:
    """Constructor arguments that every replacement of ``linear`` shares, for construction without memory."""
    return {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "device": "meta",
        "dtype": linear.weight.dtype,
    }
