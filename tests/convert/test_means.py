"""What rounding does to the means of a convolution, found from its inputs, beside the results themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilewright.convert.network.means import MeanShift
from tilewright.nn import ConvBnAct2d, Int8ConvBnAct2d


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 2, "stride": 2, "dilation": 2, "groups": 2},
        {"kernel_size": 5, "padding": "same", "groups": 8, "bias": False},
    ],
    ids=["pointwise", "padded", "strided", "depthwise"],
)
@torch.no_grad()
def test_the_shift_of_means_is_that_of_the_results(options: dict[str, Any], dims: int) -> None:
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    exact = ConvBnAct2d.from_float(kind(8, 16, **options))
    layer = Int8ConvBnAct2d.from_float(exact, input_scale=0.05, input_zero_point=-100)
    shape, shift = (11, 14)[:dims], MeanShift(exact, layer)
    sums, count = torch.zeros(16, dtype=torch.float64), 0
    before = layer.run(torch.zeros(1, 8, *shape)).flatten(2)[0, :, -1]
    for batch in (3, 2):
        x = F.relu(torch.randn(batch, 8, *shape)) * 3
        q = torch.ops.tilewright.quantize_per_tensor(x, layer.x_scale, None, layer.x_zero)
        plain = Int8ConvBnAct2d.from_float(exact, input_scale=0.05, input_zero_point=-100)
        lost = (exact.run(x) - plain.run(q)).double().transpose(0, 1).flatten(1)
        sums, count = sums + lost.sum(1), count + lost.shape[1]
        shift.add(x, q, None)
        torch.testing.assert_close(
            (layer.run(torch.zeros(1, 8, *shape)).flatten(2)[0, :, -1] - before).double(),
            sums / count,
            atol=2e-6,
            rtol=2e-4,
        )
