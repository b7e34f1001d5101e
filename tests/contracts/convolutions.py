"""Every fused convolution with its options: what a promise is checked on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from tilewright.kernels.formats.sparse24 import best_mask
from tilewright.nn import ConvBnAct2d, ConvLayer, Int8ConvBnAct2d, Sparse24ConvBnAct2d

CHANNELS, OUT = 6, 9


@dataclass(frozen=True)
class Convolution:
    """A module class, what it is made of, and the options its ``from_float`` gets."""

    name: str
    cls: type[ConvLayer]
    conv: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    norm: bool = True
    dims: int = 2

    def plain(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module | None]:
        """A random convolution, and a batch-norm with random statistics if there is one."""
        kinds: dict[int, Any] = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}
        conv_kind, norm_kind = kinds[self.dims]
        conv = conv_kind(**{"in_channels": CHANNELS, "out_channels": OUT, "kernel_size": 3, **self.conv}, dtype=dtype)
        if self.is_sparse:  # pruned already, so that the plain layer is what is stood for
            with torch.no_grad():
                rows = conv.weight.movedim(1, -1)
                conv.weight *= best_mask(rows.abs().flatten(0, -2)).reshape(rows.shape).movedim(-1, 1)
        return conv, random_norm(norm_kind(OUT, dtype=dtype)) if self.norm else None

    def make(self, dtype: torch.dtype = torch.float32, **more: Any) -> ConvLayer:
        return self.fuse(*self.plain(dtype), **more)

    def fuse(self, conv: nn.Module, norm: nn.Module | None, **more: Any) -> ConvLayer:
        from_float: Callable[..., ConvLayer] = self.cls.from_float  # type: ignore[attr-defined]
        return from_float(conv, norm, **{**self.options, **more})

    def input(self, batch: int = 2) -> torch.Tensor:
        size = (7, 5) if self.dims == 2 else (11,)
        return torch.randn(batch, self.conv.get("in_channels", CHANNELS), *size)

    @property
    def is_sparse(self) -> bool:
        return self.cls is Sparse24ConvBnAct2d

    @property
    def is_int8(self) -> bool:
        return self.cls is Int8ConvBnAct2d


def random_norm(norm: nn.Module) -> nn.Module:
    """``norm`` in eval mode with statistics and factors that are not the identity."""
    for tensor, low, high in ((norm.running_mean, -1, 1), (norm.running_var, 0.5, 2), (norm.weight, 0.5, 2)):
        nn.init.uniform_(tensor, low, high)  # type: ignore[arg-type]
    nn.init.normal_(norm.bias)  # type: ignore[arg-type]
    return norm.eval()


STATIC = {"input_scale": 3 / 127}
ZERO_POINTS = {"input_zero_point": 20, "residual_scale": 0.02, "residual_zero_point": -7}
CONVOLUTIONS = (
    Convolution("float", ConvBnAct2d, {"padding": 1, "bias": False}),
    Convolution("float-strided-grouped", ConvBnAct2d, {"stride": 3, "padding": (2, 1), "groups": 3}),
    Convolution("float-same-dilated", ConvBnAct2d, {"padding": "same", "dilation": 2}, norm=False),
    Convolution("float-no_bias", ConvBnAct2d, {"kernel_size": 1, "bias": False}, norm=False),
    Convolution("float-1d", ConvBnAct2d, {"padding": 1}, dims=1),
    Convolution("sparse24", Sparse24ConvBnAct2d, {"padding": 1, "bias": False}),
    Convolution("sparse24-strided-grouped", Sparse24ConvBnAct2d, {"stride": 3, "padding": (2, 1), "groups": 3}),
    Convolution("sparse24-1d-1x1", Sparse24ConvBnAct2d, {"kernel_size": 1}, norm=False, dims=1),
    Convolution("int8", Int8ConvBnAct2d, {"padding": 1, "bias": False}, STATIC),
    Convolution("int8-strided-grouped", Int8ConvBnAct2d, {"stride": 3, "padding": (2, 1), "groups": 3}, STATIC),
    Convolution("int8-no_bias-mse", Int8ConvBnAct2d, {"bias": False}, {**STATIC, "range_search": "mse"}, norm=False),
    Convolution("int8-1d-residual", Int8ConvBnAct2d, {"padding": 1}, {**STATIC, "residual_scale": 0.02}, dims=1),
    Convolution("int8-zero-points", Int8ConvBnAct2d, {"padding": 1, "groups": 3}, {**STATIC, **ZERO_POINTS}),
)
each_convolution = pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=[each.name for each in CONVOLUTIONS])
