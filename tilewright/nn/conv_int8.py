"""A drop-in convolution with int8 weights and statically quantised activations."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tilewright.kernels.activation import apply_activation
from tilewright.kernels.conv2d.reference import convolve
from tilewright.kernels.dispatch.derivatives import is_differentiated, straight_through, wide
from tilewright.kernels.formats import int8
from tilewright.nn import quantized_ops
from tilewright.nn.conv import ConvBnAct2d
from tilewright.nn.conv_layer import ConvLayer, Epilogue, Padding, check_conv, common_options, folded
from tilewright.nn.weight_holder import CODES

_reads = 0
#: Tensors that are int8, or may be: the names of their buffers, the letter of their numbers.
PORTS = {"input": "x", "residual": "r", "output": "y"}


def scales_read() -> int:
    """How often scales of tensors were read from buffers, by any layer: what was recorded with older ones is stale."""
    return _reads


class Int8ConvBnAct2d(ConvLayer):
    """y = activation(conv(x) + bias + residual) with int8 weights and activations; see ``kernels.int8_conv2d``.

    ``weight_codes`` int8 OHWI, ``weight_scale`` float32 [out_channels]; scales of whole tensors, known before the call:
    ``input_scale``, ``residual_scale`` (if an int8 residual may come) and ``output_scale`` (if the result is to be int8
    itself), float32 without dimensions. A float input is quantised with ``input_scale`` first, an int8 input is taken
    to be so quantised already. Without ``output_scale`` the result is a float tensor. Unless ``symmetric``, each scale
    has a zero point, int32 from -127 to 127 without dimensions: ``input_zero_point`` and so on.

    The kernels take scales and zero points of tensors as numbers. They are read from the buffers when those are loaded,
    which costs the one wait for the device; after writing into a buffer by hand, call ``refresh``. An image of a float
    input that holds NaN or an infinity comes out as NaN, and no other does; int8 holds neither. Derivatives pass the
    rounding of a float input as if that were not there; integers have none.
    """

    scheme_name = "w8a8-static"
    op_name = "int8_conv2d_fused"
    base_format = int8.Int8()
    _accepts_int8 = True

    symmetric = True
    #: The scales and zero points of tensors as numbers; 1.0 and 0 for those that are not there.
    x_scale = r_scale = y_scale = 1.0
    x_zero = r_zero = y_zero = 0

    weight_scale: torch.Tensor
    input_scale: torch.Tensor
    residual_scale: torch.Tensor | None
    output_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None
    residual_zero_point: torch.Tensor | None
    output_zero_point: torch.Tensor | None

    def __init__(
        self,
        *sizes: Any,
        residual_scale: bool = False,
        output_scale: bool = False,
        symmetric: bool = True,
        range_search: str | None = None,
        **options: Any,
    ):
        super().__init__(*sizes, **options)
        self._search(range_search)
        device = options.get("device")
        self.register_buffer(CODES, torch.empty(self.weight_shape, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(self.out_channels, dtype=torch.float32, device=device))
        for name, required in (("input", True), ("residual", residual_scale), ("output", output_scale)):
            scale = torch.ones((), dtype=torch.float32, device=device) if required else None
            self.register_buffer(f"{name}_scale", scale)
            zero = torch.zeros((), dtype=torch.int32, device=device) if required and not symmetric else None
            self.register_buffer(f"{name}_zero_point", zero)
        self.symmetric = symmetric

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d | nn.Conv1d | ConvBnAct2d,
        norm: nn.Module | None = None,
        *,
        input_scale: float,
        residual_scale: float | None = None,
        output_scale: float | None = None,
        input_zero_point: int | None = None,
        residual_zero_point: int | None = None,
        output_zero_point: int | None = None,
        range_search: str = "minmax",
        activation: str = "none",
        negative_slope: float = 0.01,
    ) -> Int8ConvBnAct2d:
        """The quantised twin of ``conv``, then ``norm`` (a batch-norm in eval mode), then the activation.

        range_search: of the weights: "minmax", or "mse", which clips outliers where that lowers the squared error. The
        layer is symmetric if no zero point is given. Raises ValueError for a scale that is not positive and finite, for
        a zero point that is not within -127 to 127 or whose scale is missing.
        """
        if isinstance(conv, ConvBnAct2d):
            if norm is not None:
                raise ValueError("a ConvBnAct2d has its batch-norm folded in already: norm must be None")
            weight, bias = conv.weight_ohwi.detach(), None if conv._bias is None else conv._bias.detach()
            options = {**conv.config(), "device": "meta"}
            options.pop("allow_tf32")
        else:
            check_conv(conv)
            weight, bias = folded(conv, norm)
            options = common_options(conv, bias is not None)
        options |= {"activation": activation, "negative_slope": negative_slope}
        scales = dict(zip(PORTS, (input_scale, residual_scale, output_scale), strict=True))
        zeros = dict(zip(PORTS, (input_zero_point, residual_zero_point, output_zero_point), strict=True))
        options |= {f"{name}_scale": scales[name] is not None for name in ("residual", "output")}
        options["symmetric"] = all(zero is None for zero in zeros.values())
        module = cls(**options, range_search=range_search)
        q, module.weight_scale = int8.quantize(weight.flatten(1), range_search)
        module._buffers[CODES] = q.view(weight.shape)
        if bias is not None:
            module.register_parameter("bias", nn.Parameter(bias.detach().clone(), requires_grad=False))
        for name in PORTS:
            scale, zero = scales[name], zeros[name]
            if zero is not None and (scale is None or not -127 <= zero <= 127):
                raise ValueError(f"{name}_zero_point must lie in -127 to 127, and have a scale, not {zero}")
            if scale is None:
                continue
            if not (scale > 0 and math.isfinite(scale)):
                raise ValueError(f"{name}_scale must be positive and finite, not {scale}")
            setattr(module, f"{name}_scale", torch.tensor(scale, dtype=torch.float32, device=weight.device))
            if not module.symmetric:
                held = torch.tensor(zero or 0, dtype=torch.int32, device=weight.device)
                setattr(module, f"{name}_zero_point", held)
        module.refresh()
        return module.train(conv.training)

    def refresh(self) -> None:
        """Read the scales and zero points of tensors anew from their buffers, if these hold values. Waits for the
        device.
        """
        for name, letter in PORTS.items():
            scale, zero = self._buffers[f"{name}_scale"], self._buffers.get(f"{name}_zero_point")
            if scale is not None and not scale.is_meta:
                setattr(self, f"{letter}_scale", float(scale))
            if zero is not None and not zero.is_meta:
                setattr(self, f"{letter}_zero", int(zero))
        global _reads
        _reads += 1

    def why_bad_buffer(self, name: str, value: torch.Tensor) -> str | None:
        """A zero point that no kernel takes."""
        if name.endswith("_zero_point") and not -127 <= int(value) <= 127:
            return f"it must lie in -127 to 127, not {int(value)}"
        return super().why_bad_buffer(name, value)

    def run(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: str = "none",
        negative_slope: float = 0.01,
        padding: Padding | None = None,
        out_scale: float | None = None,
        x_nonnegative: bool = False,
        out_zero_point: int = 0,
        marks: Iterable[torch.Tensor] = (),
    ) -> torch.Tensor:
        """As of ``ConvLayer``. marks: those of an int8 x and residual (``quantized_ops``), for a float result."""
        end = (activation, negative_slope, padding, out_scale, x_nonnegative, out_zero_point)
        return quantized_ops.mark(super().run(x, residual, *end), marks)

    def dequantize_weight(self) -> torch.Tensor:
        """The weight as float32, OHWI."""
        return self._matrix(self._held_weight()).view(self.weight_shape)

    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON."""
        scales = {name: getattr(self, name) is not None for name in ("residual_scale", "output_scale")}
        kind = {} if self.symmetric else {"symmetric": False}
        return {**super().config(), **scales, **kind, **self._search_config()}

    def _columns(self) -> int:
        return super()._columns() * self._window[0] * self._window[1]

    def _shape_of(self, operand: str) -> tuple[int, ...] | None:
        return self.weight_shape if operand == "weight" else None

    def _own_output(self) -> tuple[float | None, bool, int]:
        return (None, False, 0) if self.output_scale is None else (self.y_scale, False, self.y_zero)

    def _convolve(self, x: torch.Tensor, residual: torch.Tensor | None, end: Epilogue) -> torch.Tensor:
        """x float, or int8 with ``input_scale`` -> int8 if there is an out_scale, else float.

        residual: float, or int8 with ``residual_scale``.
        """
        if x.is_floating_point() and end[3] is None and is_differentiated(x, residual):
            integers, smooth = functools.partial(self._integers, end=end), functools.partial(self._smooth, end=end)
            return straight_through(integers, smooth, x, residual)
        return self._integers(x, residual, end)

    def _smooth(self, x: torch.Tensor, residual: torch.Tensor | None, end: Epilogue) -> torch.Tensor:
        """The same in float32, or float64 for x of that; the rounding of x has the derivative 1."""
        activation, negative_slope, padding, *_ = end
        image = quantized_ops.rounded(x.to(wide(x)), self.x_scale, zero_point=self.x_zero)
        pads = padding or self._padding or self.same_padding_for(x.shape[2], x.shape[3])
        window = (self._stride, pads, self._dilation, self.groups)
        y = convolve(image, self.dequantize_weight().to(image.dtype), *window)
        if self._bias is not None:
            y = y + self._bias.to(y.dtype).view(-1, 1, 1)
        if residual is not None:
            r_scale, r_zero = self._residual_grid(residual)
            y = y + (residual.to(y.dtype) - r_zero) * r_scale
        return apply_activation(y, activation, negative_slope=negative_slope)

    def _residual_grid(self, residual: torch.Tensor | None) -> tuple[float, int]:
        """Scale and zero point."""
        return (self.r_scale, self.r_zero) if residual is not None and residual.dtype == torch.int8 else (1.0, 0)

    def _integers(self, x: torch.Tensor, residual: torch.Tensor | None, end: Epilogue) -> torch.Tensor:
        """By the operators."""
        activation, negative_slope, padding, out_scale, x_nonnegative, out_zero = end
        dtype, marks = x.dtype, None
        if dtype.is_floating_point:
            x, marks = quantized_ops.quantize(x, self.x_scale, zero_point=self.x_zero)
        else:
            dtype = self.dtype
        r_scale, r_zero = self._residual_grid(residual)
        pads = padding or self._padding or self.same_padding_for(x.shape[2], x.shape[3])
        separate = residual is not None and not self._residual_fits(x, residual, pads)
        quantized = out_scale is not None and not separate
        out_dtype = dtype if dtype in (torch.float16, torch.bfloat16) and not separate else torch.float32
        y = torch.ops.tilewright.int8_conv2d_fused(
            x,
            self.x_scale,
            self._buffers[CODES],
            self.weight_scale,
            self._bias,
            None if separate else residual,
            r_scale,
            self._stride,
            pads,
            self._dilation,
            self.groups,
            "none" if separate else activation,
            negative_slope,
            out_scale if quantized else None,
            None if quantized else out_dtype,
            x_nonnegative and not self.x_zero,
            self.x_zero,
            0 if separate else r_zero,
            out_zero if quantized else 0,
        )
        if residual is not None and separate:
            added = (residual.to(y.dtype) - r_zero) * r_scale
            y = apply_activation(y + added, activation, negative_slope=negative_slope)
            if out_scale is not None:
                return torch.ops.tilewright.quantize_per_tensor(y, out_scale, None, out_zero)
        y = y if quantized or y.dtype == dtype else y.to(dtype)
        return y if quantized or marks is None else quantized_ops.mark(y, (marks,))

    def extra_repr(self) -> str:
        """As of ``ConvLayer``, then the scales and zero points."""
        displayed = super().extra_repr()
        for name, letter in PORTS.items():
            if self._buffers[f"{name}_scale"] is not None:
                displayed += f", {name}_scale={getattr(self, f'{letter}_scale'):.4g}"
            if self._buffers.get(f"{name}_zero_point") is not None:
                displayed += f", {name}_zero_point={getattr(self, f'{letter}_zero')}"
        return displayed
