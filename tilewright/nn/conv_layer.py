"""What fused convolutions share: the attributes of ``nn.Conv2d``, geometry, rules of casting and loading, errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from tilewright.kernels.activation import CONV_ACTIVATIONS, check_activation
from tilewright.kernels.conv_geometry import ConvGeometry
from tilewright.kernels.convolution import convolution_problem
from tilewright.kernels.dispatch.derivatives import is_transformed
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.nn.float_weight import FloatWeight
from tilewright.nn.quantized_linear import dtype_name, parse_dtype
from tilewright.nn.stored_weight import Stored
from tilewright.nn.weight_holder import WeightHolder

#: Padding modes by name. "dynamic_same" is TensorFlow's "SAME": the output has ceil(size / stride) pixels, and what
#: cannot be split evenly is padded at the end.
PADDING_NAMES = ("same", "valid", "dynamic_same")
#: What ``nn.Conv2d`` calls its sizes.
SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")

Padding = tuple[int, int, int, int]
#: Where nothing is strided, "same" does not depend on the size.
ANY_IMAGE = (1 << 20, 1 << 20)
#: activation, negative_slope, padding, out_scale, x_nonnegative, out_zero_point: as of ``ConvLayer.run``.
Epilogue = tuple[str, float, Padding | None, float | None, bool, int]


def pair(name: str, value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """An int, or ``dims`` of them, as a tuple. Raises ValueError naming the argument."""
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims or not all(isinstance(each, int) for each in values):
        raise ValueError(f"{name} must be an int or {dims} of them, not {value!r}")
    return values


def _as_2d(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Of a convolution of one dimension or two: height and width."""
    height, width = (1, *sizes)[-2:]
    return height, width


def same_padding(
    image: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Padding:
    """Zeros at the top, bottom, left and right of an image [H, W], for ceil(size / stride) pixels of output."""
    height, width = (
        max((-(-size // step) - 1) * step + gap * (taps - 1) + 1 - size, 0)
        for size, taps, step, gap in zip(image, kernel, stride, dilation, strict=True)
    )
    return height // 2, height - height // 2, width // 2, width - width // 2


class ConvLayer(WeightHolder):
    """Base of the drop-in replacements of ``nn.Conv2d`` and ``nn.Conv1d``: y = activation(conv(x) + b + residual).

    Stored is OHWI, [out_channels, kh, kw, in_channels / groups]; a 1-D convolution is a 2-D one of height 1. The
    parameter ``bias``, with batch-norm folded in, is float32 and stays so under ``.to(dtype)``, as buffers do; to code
    that reads ``layer.bias`` it has the layer's dtype. ``dtype`` is that of the layer this one stands for; it follows
    ``.to(dtype)``. Results are float tensors in the memory layout of the
    input (contiguous or channels-last), as PyTorch's are. Arguments are those of ``nn.Conv2d`` and what is fused in.
    """

    _accepts_int8: ClassVar[bool] = False
    _loads_exactly = True

    transposed = False
    padding_mode = "zeros"
    #: Whether the bias does nothing but make up for the rounding of the weight, of a layer that had none.
    corrected: bool = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        activation: str = "none",
        negative_slope: float = 0.01,
        origin: str = "Conv2d",
        corrected: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ):
        super().__init__()
        check_activation(activation, CONV_ACTIVATIONS)
        if origin not in ("Conv2d", "Conv1d"):
            raise ValueError(f"origin must be 'Conv2d' or 'Conv1d', not {origin!r}")
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if groups < 1 or value < 1 or value % groups:
                raise ValueError(f"{name} must be a positive multiple of groups={groups}, not {value}")
        dims = 1 if origin == "Conv1d" else 2
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = pair("kernel_size", kernel_size, dims)
        self.stride = pair("stride", stride, dims)
        self.dilation = pair("dilation", dilation, dims)
        self.padding = padding if isinstance(padding, str) else pair("padding", padding, dims)
        self.output_padding = (0,) * dims
        self.activation = activation
        self.negative_slope = negative_slope
        self.origin = origin
        if corrected:
            self.corrected = True
        self.layer_name = ""
        self.dtype = parse_dtype(dtype) or torch.get_default_dtype()
        self._window, self._stride, self._dilation = map(_as_2d, (self.kernel_size, self.stride, self.dilation))
        self._padding = self._fixed_padding()
        self._dims, self._plain = dims, dims == 2
        if bias:
            self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, device=device, dtype=torch.float32)))
        else:
            self.register_parameter("bias", None)

    def _fixed_padding(self) -> Padding | None:
        """Top, bottom, left, right; None if it depends on the input."""
        if isinstance(self.padding, str):
            if self.padding not in PADDING_NAMES:
                raise ValueError(f"padding must be integers or one of {', '.join(PADDING_NAMES)}, not {self.padding!r}")
            if self.padding == "same" and any(stride != 1 for stride in self.stride):
                raise ValueError("padding='same' is not defined for strided convolutions")
            if self.padding == "valid":
                return 0, 0, 0, 0
            if self.padding == "dynamic_same" and any(stride != 1 for stride in self.stride):
                return None
            return same_padding(ANY_IMAGE, self._window, (1, 1), self._dilation)
        vertical, horizontal = (0, *self.padding)[-2:]
        return vertical, vertical, horizontal, horizontal

    # ---- what subclasses provide
    def _convolve(self, x: torch.Tensor, residual: torch.Tensor | None, end: Epilogue) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__}._convolve")

    def dequantize_weight(self) -> torch.Tensor:
        """The weight as float32, OHWI."""
        raise NotImplementedError(f"{type(self).__name__}.dequantize_weight")

    # ---- public
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
    ) -> torch.Tensor:
        """The convolution with an epilogue of the caller's choice, its result channels-last.

        x: as of ``forward``. residual: added before the activation; if its shape is another than the result's, as
        broadcasting allows, after the kernel instead of in it. padding: top, bottom, left, right, in place of the
        layer's own. out_scale, out_zero_point: of an int8 result. x_nonnegative: an int8 x stands for no negative
        value.
        """
        end = (activation, negative_slope, padding, out_scale, x_nonnegative, out_zero_point)
        if self._plain and x.dim() == 4:
            return self._convolve(x, residual, end)
        other = None if residual is None else self._as_images(residual)
        y = self._convolve(self._as_images(x), other, end)
        y = y if self._plain else y.squeeze(2)
        return y if x.dim() == self._dims + 2 else y.squeeze(0)

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """input [N, C, H, W], or [N, C, L] where it stands for an ``nn.Conv1d``; the batch dimension may be missing.

        residual: of the shape of the result, added before the activation. Raises ValueError and TypeError that name the
        layer.
        """
        x = input
        self._check_input(x)
        y = self.run(x, residual, self.activation, self.negative_slope, None, *self._own_output())
        # In ``torch.vmap`` nobody says in which order an image is.
        known = not is_transformed()
        channels_last = known and self._as_images(x).is_contiguous(memory_format=torch.channels_last)
        return y if channels_last else y.contiguous()

    def _own_output(self) -> tuple[float | None, bool, int]:
        """out_scale and what follows it, of ``forward``."""
        return None, False, 0

    def config(self) -> dict[str, Any]:
        """Constructor arguments except ``device``, fit for JSON."""
        own = {name: getattr(self, name) for name in (*SIZES, "activation", "negative_slope", "origin")}
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        corrected = {"corrected": True} if self.corrected else {}
        return {**own, "bias": self._bias is not None, **corrected, "dtype": dtype_name(self.dtype)}

    def to_float(self) -> nn.Conv2d | nn.Conv1d:
        """A plain convolution with the same weight (dequantised) and bias in ``dtype``; batch-norm stays folded in, and
        a bias that only corrects goes.

        Raises ValueError if an activation is fused in.
        """
        if self.activation != "none":
            raise ValueError(f"{self._label()} ends in {self.activation}, which nn.{self.origin} cannot")
        same = self.padding == "dynamic_same"
        kind: Any = nn.Conv1d if self.origin == "Conv1d" else Conv2dSame if same else nn.Conv2d
        padding = 0 if same else self.padding
        sizes = (self.in_channels, self.out_channels, self.kernel_size, self.stride, padding, self.dilation)
        bias = self._bias
        if self.corrected and bias is not None and not bias.requires_grad:  # nobody has set it or trains it
            bias = None
        conv = kind(*sizes, self.groups, bias is not None, device="meta", dtype=self.dtype)
        weight = self._weight_of(self.dequantize_weight()).detach().to(self.dtype)
        conv.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if bias is not None:
            conv.bias = nn.Parameter(bias.detach().to(self.dtype), requires_grad=bias.requires_grad)
        return conv.train(self.training)

    def correct_bias(self, shift: torch.Tensor) -> None:
        """Add ``shift`` float32 [out_channels], which makes up for the rounding of the weight, to the bias."""
        bias = self._bias
        self.corrected = self.corrected or bias is None
        new = shift if bias is None else bias.detach() + shift
        self.register_parameter("bias", nn.Parameter(new, requires_grad=False))

    def problem(self, m: int = 1, dtype: torch.dtype | None = None, size: int = 56) -> Problem:
        """What the router is asked for ``m`` images of ``size`` x ``size`` pixels; dtype: the layer's by default."""
        height = 1 if self.origin == "Conv1d" else size
        window = (self._window, self._stride, self.padding_for(height, size), self._dilation, self.groups)
        geometry = ConvGeometry(m, self.in_channels, height, size, self.out_channels, *window)
        dtype = dtype or self.dtype
        facts = {"activation": self.activation, "bias": self._bias is not None, **device_facts(self.device)}
        return convolution_problem(self.op_name, geometry, dtype, dtype, **facts)

    def padding_for(self, height: int, width: int) -> Padding:
        """Zeros at the top, bottom, left and right of an image of that size."""
        return self._padding or self.same_padding_for(height, width)

    def same_padding_for(self, height: int, width: int) -> Padding:
        """The same as TensorFlow's "SAME" has it, whatever ``padding`` says."""
        return same_padding((height, width), self._window, self._stride, self._dilation)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """OHWI."""
        return self.out_channels, *self._window, self.in_channels // self.groups

    def extra_repr(self) -> str:
        """As ``nn.Conv2d`` prints itself, then what is special."""
        displayed = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding not in ("valid", (0,) * self._dims):
            displayed += f", padding={self.padding}"
        if any(each != 1 for each in self.dilation):
            displayed += f", dilation={self.dilation}"
        if self.groups != 1:
            displayed += f", groups={self.groups}"
        if self._bias is None:
            displayed += ", bias=False"
        return displayed if self.activation == "none" else f"{displayed}, activation={self.activation}"

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias in ``dtype``: the parameter itself, or one that reads and writes as ``weight`` does."""
        if "bias" not in self._parameters:
            raise AttributeError("bias")  # ``nn.Module`` asks before it registers one
        bias = self._parameters["bias"]
        if bias is None or bias.dtype == self.dtype:
            return bias
        return (
            bias.to(self.dtype) if torch.compiler.is_compiling() else FloatWeight(Stored(_Bias(self), {"bias": bias}))
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bias" and isinstance(value, FloatWeight):  # the end of ``layer.bias += x``
            value = value._parameter()
        elif name == "bias" and isinstance(value, nn.Parameter) and value.dtype != torch.float32:
            value = nn.Parameter(value.detach().float(), value.requires_grad)
        super().__setattr__(name, value)

    # ---- internal
    @property
    def _bias(self) -> nn.Parameter | None:
        """The parameter."""
        return self._parameters["bias"]

    def _weight_size(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _columns(self) -> int:
        return self.in_channels // self.groups

    def _matrix_of(self, weight: torch.Tensor) -> torch.Tensor:
        images = weight.unsqueeze(2) if self._dims == 1 else weight
        return images.permute(0, 2, 3, 1).reshape(-1, self._columns())

    def _weight_of(self, matrix: torch.Tensor) -> torch.Tensor:
        images = matrix.reshape(self.weight_shape).permute(0, 3, 1, 2)
        return (images.squeeze(2) if self._dims == 1 else images).clone(memory_format=torch.contiguous_format)

    def _as_images(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` with the dimensions that a 2-D convolution of a batch has."""
        x = x if x.dim() == self._dims + 2 else x.unsqueeze(0)
        return x if self._dims == 2 else x.unsqueeze(2)

    def _check_input(self, x: torch.Tensor) -> None:
        self._check_layout(x)
        if not x.is_floating_point() and not (x.dtype == torch.int8 and self._accepts_int8):
            raise TypeError(f"{self._label()} takes float input, not {x.dtype}")
        if x.dim() not in (self._dims + 1, self._dims + 2) or x.shape[-self._dims - 1] != self.in_channels:
            required = "[N, C, L]" if self._dims == 1 else "[N, C, H, W]"
            raise ValueError(
                f"{self._label()} takes input {required} with {self.in_channels} channels, "
                f"not input of shape {list(x.shape)}"
            )

    def _residual_fits(self, x: torch.Tensor, residual: torch.Tensor, padding: Padding) -> bool:
        """Whether ``residual`` has the shape of the result, so that adding it needs no broadcasting."""
        if residual.dim() != 4 or residual.shape[0] != x.shape[0] or residual.shape[1] != self.out_channels:
            return False
        for i, pads in ((0, padding[0] + padding[1]), (1, padding[2] + padding[3])):
            reach = self._dilation[i] * (self._window[i] - 1) + 1
            if residual.shape[i + 2] != (x.shape[i + 2] + pads - reach) // self._stride[i] + 1:
                return False
        return True

    def _kept_in_dtype(self) -> dict[str, torch.Tensor]:
        return {**super()._kept_in_dtype(), **({} if self._bias is None else {"bias": self._bias})}


class _Bias:
    """A bias in float32 for code that wants the dtype of its layer; see ``stored_weight.Owner``."""

    def __init__(self, layer: ConvLayer):
        self.layer = layer

    def _title(self) -> str:
        return f"the bias of {self.layer._label()}"

    def _weight_size(self) -> tuple[int, ...]:
        return (self.layer.out_channels,)

    def _weight_dtype(self, held: Mapping[str, torch.Tensor]) -> torch.dtype:
        return self.layer.dtype

    def _decoded(self, held: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return held["bias"].to(self.layer.dtype)

    def _encoded(self, bias: torch.Tensor, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"bias": bias.detach().to(held["bias"].dtype)}


def check_conv(conv: nn.Module) -> None:
    """Raise TypeError unless ``conv`` has what ``nn.Conv2d`` or ``nn.Conv1d`` has."""
    if not isinstance(conv, (nn.Conv2d, nn.Conv1d)):
        raise TypeError(f"from_float takes an nn.Conv2d or nn.Conv1d, not {type(conv).__name__}")
    if conv.padding_mode != "zeros":
        raise ValueError(f"from_float takes convolutions padded with zeros, not padding_mode={conv.padding_mode!r}")


def common_options(conv: nn.Conv2d | nn.Conv1d, bias: bool) -> dict[str, Any]:
    """Constructor arguments that every replacement of ``conv`` shares, for construction without memory."""
    return {
        **{name: getattr(conv, name) for name in SIZES},
        **({"padding": "dynamic_same"} if pads_by_size(conv) else {}),
        "bias": bias,
        "origin": "Conv1d" if isinstance(conv, nn.Conv1d) else "Conv2d",
        "device": "meta",
        "dtype": conv.weight.dtype,
    }


class Conv2dSame(nn.Conv2d):
    """A plain convolution that pads as TensorFlow's "SAME" does, by the size of its input."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [N, C, H, W] -> [N, Co, ceil(H / stride), ceil(W / stride)]."""
        top, bottom, left, right = same_padding(input.shape[-2:], self.kernel_size, self.stride, self.dilation)
        return super().forward(nn.functional.pad(input, (left, right, top, bottom)))


def pads_by_size(conv: nn.Module) -> bool:
    """Whether ``conv`` is a ``Conv2dSame``, ours or timm's; that is known by name, not imported."""
    return isinstance(conv, Conv2dSame) or any(
        kind.__name__ == "Conv2dSame" and kind.__module__.startswith("timm.") for kind in type(conv).__mro__
    )


#: Channels whose weights are folded at once.
_FOLDED = 16


def folded(conv: nn.Conv2d | nn.Conv1d, norm: nn.Module | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight OHWI and bias float32 of ``conv`` followed by ``norm`` in eval mode, or of ``conv`` alone.

    With s = gamma / sqrt(running_var + eps): W' = s W and b' = s (b - running_mean) + beta. Where there is a norm the
    products are taken in float64 and the weight is rounded once to its own dtype.
    """
    weight = conv.weight.detach()
    weight = weight.unsqueeze(2) if weight.dim() == 3 else weight
    bias = None if conv.bias is None else conv.bias.detach()
    if norm is not None:
        scale, shift = affine_of(norm, conv.out_channels)
        scale, shift = scale.to(weight.device), shift.to(weight.device)
        dtype = weight.dtype
        # A block at a time, which a cache holds in float64 too.
        blocks = zip(weight.split(_FOLDED), scale.view(-1, 1, 1, 1).split(_FOLDED), strict=True)
        weight = torch.cat([(block.double() * factors).to(dtype) for block, factors in blocks])
        bias = shift if bias is None else bias.double() * scale + shift
    weight = weight.permute(0, 2, 3, 1).contiguous()
    return weight, None if bias is None else bias.float()


def affine_of(norm: nn.Module, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a batch-norm does in eval mode: y = x * scale + shift, float64 [channels] each.

    Raises ValueError for one that normalises by the batch, or has another number of channels.
    """
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if mean is None or variance is None:
        raise ValueError(f"{type(norm).__name__} has no running statistics: it normalises by the batch")
    if mean.numel() != channels:
        raise ValueError(f"{type(norm).__name__} has {mean.numel()} channels, the convolution {channels}")
    eps = float(getattr(norm, "eps", 0.0))
    scale = (variance.detach().double() + eps).rsqrt()
    if (gamma := getattr(norm, "weight", None)) is not None:
        scale = scale * gamma.detach().double()
    shift = -mean.detach().double() * scale
    if (beta := getattr(norm, "bias", None)) is not None:
        shift = shift + beta.detach().double()
    return scale, shift
