"""Which convolutions of a recording may be done together, rows after rows: conv_band.c.

A convolution whose results a depthwise one alone reads, and one by 1 x 1 that alone reads the results of that; or two
neighbours of these. The memory that the first of them reads must stay until the last has written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from tilewright.kernels.cpu import steps
from tilewright.kernels.cpu.recording import Call, tensors_in
from tilewright.kernels.cpu.steps import Description

_CONV = "tilewright.conv2d_fused.default"
_ANY, _DEPTHWISE, _POINTWISE = "any", "depthwise", "pointwise"


def find(groups: Sequence[Sequence[Call]], result: Any) -> list[range]:
    """Numbers of groups, each of one call, that may be done together."""
    reads = Counter(
        storage
        for group in groups
        for call in group
        for storage in {tensor.untyped_storage().data_ptr() for tensor in tensors_in((call.args, call.kwargs))}
    )
    reads.update({tensor.untyped_storage().data_ptr() for tensor in tensors_in(result)})
    kinds = [_kind(group) for group in groups]

    def follows(number: int) -> bool:
        """Whether a group reads what the one before makes, and nothing else does."""
        made, read = groups[number - 1][0].result, groups[number][0].args[0]
        storage = made.untyped_storage().data_ptr()
        return read.shape == made.shape and storage == read.untyped_storage().data_ptr() and reads[storage] == 1

    found: list[range] = []
    for number, kind in enumerate(kinds):
        if kind != _DEPTHWISE:
            continue
        begin, end = number, number + 1
        taken = bool(found) and found[-1].stop > number - 1
        if number and kinds[number - 1] in (_ANY, _POINTWISE) and not taken and follows(number):
            begin -= 1
        if end < len(groups) and kinds[end] == _POINTWISE and follows(end):
            end += 1
        if end - begin > 1:
            found.append(range(begin, end))
    return found


def _kind(group: Sequence[Call]) -> str | None:
    """Of a group that is one convolution of float32."""
    call = group[0]
    if len(group) > 1 or call.name != _CONV or len(call.args) < 2 or not isinstance(call.result, torch.Tensor):
        return None
    declared = getattr(call.function, "_schema", None)
    if declared is None:
        return None
    named = dict(zip([argument.name for argument in declared.arguments], call.args, strict=False)) | call.kwargs
    x, weight, groups = named["x"], named["weight"], named.get("groups", 1)
    if x.dtype != torch.float32 or call.result.dtype != torch.float32 or x.dim() != 4:
        return None
    out_channels, height, width, channels = weight.shape
    if groups == out_channels and channels == 1 and groups > 1:
        return _DEPTHWISE
    if groups > 1:
        return None
    one = (height, width) == (1, 1) and x.shape[2:] == call.result.shape[2:] and not any(named.get("padding", ()))
    return _POINTWISE if one and set(named.get("stride", (1, 1))) == {1} else _ANY


def mark(together: Sequence[Description]) -> bool:
    """Let the steps of one range run together, if they are what their calls looked like."""
    kinds = [step.kind for step in together]
    if kinds not in (
        [steps.CONV, steps.DEPTHWISE, steps.CONV],
        [steps.CONV, steps.DEPTHWISE],
        [steps.DEPTHWISE, steps.CONV],
    ):
        return False
    if any(later.x != earlier.y for earlier, later in pairwise(together)):
        return False
    together[0].band = len(together)
    return True
