"""Convolution with a 2:4 weight that is unpacked once for each layer; whatever serves ``conv2d_fused`` then multiplies.

2:4 weights are smaller to store. Convolutions read each weight once for a whole image, so there is little to gain from
reading fewer bytes, and no library convolves with sparse tensor cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.sparse24_conv2d.reference import unpack_weight


def sparse24_conv2d_fused(
    x: torch.Tensor,
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    kernel_size: Sequence[int],
    groups: int,
    **rest: Any,
) -> torch.Tensor:
    """See ``reference.sparse24_conv2d_fused``."""
    weight = packed(
        weight_values,
        f"2:4 convolution, {x.shape[1]} channels in {groups} groups, {tuple(kernel_size)}, {x.dtype}",
        lambda: unpack_weight(x, weight_values, weight_meta, kernel_size, groups),
        weight_meta,
    )
    return torch.ops.tilewright.conv2d_fused(x, weight, groups=groups, **rest)
