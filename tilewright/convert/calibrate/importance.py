"""Whether the errors of a weight are to be weighed by the inputs it multiplies."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tilewright.convert.calibrate.rows import Found, RowSample, output_error


def search_importance(module: nn.Module, sample: RowSample, build: Callable[..., nn.Module]) -> Found:
    """Whether to weigh the errors of a weight by the mean square of the input channel it multiplies.

    build: makes the quantised layer, with ``importance=`` float32 [K] or without. The weighing is kept if it lowers the
    error of the output on the sampled rows.
    """
    if sample.rows is None:
        return Found()
    options = {"importance": sample.rows.float().square().mean(0)}
    plain, weighed = (output_error(module, build(**given), sample) for given in ({}, options))
    better = weighed is not None and (plain is None or weighed < plain)
    return Found(options) if better else Found()
