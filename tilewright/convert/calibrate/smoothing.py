"""Finds, from sample inputs, a scale for each input channel that makes int8 activations lose less.

Activations are quantised per row, so one large channel makes the steps coarse for all others. With c > 0 for each
input channel

    x W^T = (x c) (W / c)^T

and c below 1 for large channels moves their size into the weight, which has a scale of its own for every row.
SmoothQuant (Xiao et al. 2022, equation 4) takes 1 / c_j = max|x_j|^a / max|W_j|^(1 - a). Here the exponent a is
searched for each layer: the one with the least squared error of the quantised layer's output. No scale at all is among
the candidates.

Candidates are compared on some of the sampled rows and some of the outputs, all of them in one layer: their scaled rows
lie below each other, and so do their scaled weights, whose rows are quantised each by itself. What these integers stand
for is multiplied in float32, each candidate's rows by its own weight: no weight is put in a kernel's order for one
product. The best is then made; where it is not clear whether it is worth a pass, it is measured on every sampled row
and every output beside the layer without a scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tilewright.convert.calibrate.rows import Found, OutputErrors, RowSample

#: Exponents that the search tries.
EXPONENTS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85)
#: What is left of the error where a scale is worth having: it costs a pass over the input at every call.
WORTHWHILE = 0.7
#: Rows and outputs that candidates are compared on.
_ROWS, _OUTPUTS = 128, 128
#: How much too large an estimated gain is taken to be. In all-MiniLM-L6-v2 it was 13 % at most.
_ROOM = 1.25
#: So many of the best by estimate are compared on all rows and outputs. all-MiniLM-L6-v2 has 25.94 dB, signal over
#: error, with them, as with a search on everything; with a third 25.95, and with the first alone 24.93.
_FINALISTS = 2

#: Makes the quantised layer that stands for a linear one, with ``channel_scale=`` float32 [K] or without.
Build = Callable[..., nn.Module]


def smoothing_scale(largest_x: torch.Tensor, largest_w: torch.Tensor, exponent: float | torch.Tensor) -> torch.Tensor:
    """c of the equation above, float32 [K], with a geometric mean of 1; [E, K] for exponents [E, 1].

    largest_x, largest_w: max|x_j| and max|W_j| of each input channel [K]. Channels that are zero on either side count
    as the smallest one that is not.
    """
    x, w = _without_zeros(largest_x.float()), _without_zeros(largest_w.float())
    logarithm = (1 - exponent) * w.log() - exponent * x.log()
    return (logarithm - logarithm.mean(-1, keepdim=True)).exp()


def _without_zeros(values: torch.Tensor) -> torch.Tensor:
    positive = values[values > 0]
    return values.clamp(min=positive.amin()) if len(positive) else torch.ones_like(values)


def search_smoothing(linear: nn.Linear, sample: RowSample, build: Build, source: nn.Linear | None = None) -> Found:
    """Try every exponent on sampled rows and keep what comes nearest to the float layer, if that is worth a pass.

    source: the layer that is quantised, where that is another than the one to come near to, such as a pruned one.
    build: is given that, or another that holds a part of its weight.
    """
    if sample.rows is None or sample.largest is None:
        return Found()
    source = linear if source is None else source
    with torch.no_grad():
        largest_w = linear.weight.detach().abs().amax(0)
        exponents = torch.tensor(EXPONENTS, device=largest_w.device).unsqueeze(1)
        scales = smoothing_scale(sample.largest, largest_w, exponents)
        plain, *estimates = _estimates(linear, source.weight, sample.rows, scales, build)
        order = sorted(range(len(estimates)), key=estimates.__getitem__)
        exact, least = OutputErrors(linear, sample), estimates[order[0]]
        best, error = Found(), None
        if least < WORTHWHILE * _ROOM * plain:
            for place in order[:_FINALISTS]:
                if estimates[place] > _ROOM * least:
                    break
                options = {"channel_scale": scales[place].clone()}
                scaled = build(source, **options)
                found = exact.of(scaled)
                if found is not None and (error is None or found < error):
                    best, error = Found(options, EXPONENTS[place], replacement=scaled, error=found), found
            if error is not None and least * _ROOM < WORTHWHILE * plain:
                return best
        without = build(source)
        most = exact.of(without)
        if error is not None and (most is None or error < WORTHWHILE * most):
            return best
        return Found(replacement=without, error=most)


def _estimates(
    linear: nn.Linear, weight: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, build: Build
) -> list[float]:
    """The error of the layer without a scale, then with each of ``scales`` float32 [E, K]; Inf for one that is no
    number.

    build: makes layers that quantise their rows and have ``dequantize_weight()``.
    """
    x = rows[:_ROWS].float()
    outputs, stand_for = _sampled_outputs(linear.weight.detach())
    exact, w = (each.detach()[outputs].float() for each in (linear.weight, weight))
    factors = torch.cat([torch.ones_like(scales[:1]), scales]).unsqueeze(1)
    together = nn.Linear(w.shape[1], len(factors) * len(w), bias=False, device="meta")
    together.weight = nn.Parameter((w / factors).flatten(0, 1), requires_grad=False)
    weights: torch.Tensor = build(together).dequantize_weight()  # type: ignore[operator]
    codes, steps = torch.ops.tilewright.quantize_per_row((x * factors).flatten(0, 1))
    inputs = codes.float().mul_(steps.unsqueeze(-1)).view(len(factors), *x.shape)
    minus_exact = F.linear(x, exact).neg_().expand(len(factors), -1, -1)
    off = torch.baddbmm(minus_exact, inputs, weights.float().view(len(factors), *w.shape).mT)
    errors = off.square_().sum(1).T
    return torch.nan_to_num(stand_for @ errors, nan=torch.inf).sqrt().tolist()


def _sampled_outputs(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows of a weight, and of how many each is one, float32. The longest rows, which err most, are all taken;
    of the others some of every length are.
    """
    order = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).argsort(descending=True, stable=True)
    if len(order) <= _OUTPUTS:
        return order, torch.ones(len(order), device=order.device)
    longest, others = order.tensor_split([_OUTPUTS // 2])
    some = others[:: len(others) // (_OUTPUTS // 2)]
    shares = [(longest, 1.0), (some, len(others) / len(some))]
    return torch.cat([longest, some]), torch.cat(
        [torch.full_like(each, share, dtype=torch.float32) for each, share in shares]
    )
