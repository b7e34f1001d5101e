"""Finds, from sample inputs, a scale for each input channel that makes int8 activations lose less.

Activations are quantised per row, so one large channel makes the steps coarse for all others. With c > 0 for each
input channel

    x W^T = (x c) (W / c)^T

and c below 1 for large channels moves their size into the weight, which has a scale of its own for every row.
SmoothQuant (Xiao et al. 2022, equation 4) takes 1 / c_j = max|x_j|^a / max|W_j|^(1 - a). Here the exponent a is
searched for each layer: the one with the least squared error of the quantised layer's output on sampled rows. No scale
at all is among the candidates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tilewright.convert.calibrate.rows import Found, RowSample, output_error

#: Exponents that the search tries.
EXPONENTS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85)
#: What is left of the error where a scale is worth having: it costs a pass over the input at every call.
WORTHWHILE = 0.7


def smoothing_scale(largest_x: torch.Tensor, largest_w: torch.Tensor, exponent: float) -> torch.Tensor:
    """c of the equation above, float32 [K], with a geometric mean of 1.

    largest_x, largest_w: max|x_j| and max|W_j| of each input channel [K]. Channels that are zero on either side count
    as the smallest one that is not.
    """
    x, w = _without_zeros(largest_x.float()), _without_zeros(largest_w.float())
    logarithm = (1 - exponent) * w.log() - exponent * x.log()
    return (logarithm - logarithm.mean()).exp()


def _without_zeros(values: torch.Tensor) -> torch.Tensor:
    positive = values[values > 0]
    return values.clamp(min=positive.amin()) if len(positive) else torch.ones_like(values)


def search_smoothing(linear: nn.Linear, sample: RowSample, build: Callable[..., nn.Module]) -> Found:
    """Try every exponent on the sampled rows and keep what comes nearest to the float layer, if that is worth a pass.

    build: makes the quantised layer, with ``channel_scale=`` float32 [K] or without.
    """
    if sample.rows is None or sample.largest is None:
        return Found()
    with torch.no_grad():
        largest_w = linear.weight.detach().abs().amax(0)
        plain, best = output_error(linear, build(), sample), Found()
        least = None if plain is None else WORTHWHILE * plain
        for exponent in EXPONENTS:
            scale = smoothing_scale(sample.largest, largest_w, exponent)
            error = output_error(linear, build(channel_scale=scale), sample)
            if error is not None and (least is None or error < least):
                least, best = error, Found({"channel_scale": scale}, exponent)
    return best
