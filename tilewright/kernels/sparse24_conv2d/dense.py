"""Convolution with a 2:4 weight that is unpacked once for each layer; whatever serves ``conv2d_fused`` then multiplies.

2:4 weights are smaller to store. Convolutions read each weight once for a whole image, so there is little to gain from
reading fewer bytes, and no library convolves with sparse tensor cores.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.sparse24_conv2d.reference import unpack_weight

#: Of what ``conv2d_fused`` takes after its weight, in order: names would cost each call two microseconds.
_REST = ("bias", "residual", "stride", "padding", "dilation", "groups", "activation", "negative_slope", "allow_tf32")
_rest_of = operator.itemgetter(*_REST)


def sparse24_conv2d_fused(
    x: torch.Tensor,
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    kernel_size: Sequence[int],
    **rest: Any,
) -> torch.Tensor:
    """See ``reference.sparse24_conv2d_fused``."""
    groups = rest["groups"]
    weight = packed(
        weight_values,
        f"2:4 convolution, {x.shape[1]} channels in {groups} groups, {tuple(kernel_size)}, {x.dtype}",
        lambda: unpack_weight(x, weight_values, weight_meta, kernel_size, groups),
        weight_meta,
    )
    return torch.ops.tilewright.conv2d_fused(x, weight, *_rest_of(rest))
