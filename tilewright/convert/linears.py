"""Converts the linear layers of a model, one at a time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tilewright.convert import calibrate, structure, timing
from tilewright.convert.conversion import Conversion, register_conversion
from tilewright.convert.plan import Planned
from tilewright.convert.progress import track
from tilewright.convert.record import NOT_FASTER, LayerRecord
from tilewright.convert.text import display_name

logger = logging.getLogger("tilewright")


@register_conversion("linear layers")
class Linears(Conversion):
    """Replaces each layer by what its scheme builds from it and a sample of the rows that reach it."""

    samples: dict[str, calibrate.RowSample] | None = None

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """While this is open, what reaches each layer is sampled."""
        found = {name: self.job.model.get_submodule(name) for name in self.planned}
        rows = max((planned.scheme.sample_rows for planned in self.planned.values()), default=calibrate.MAX_ROWS)
        memory = self.job.memory
        with calibrate.sampling(found, memory.rows_of_each(found, rows), memory) as self.samples:
            yield

    def replace(self, samples: list[Any]) -> None:
        """Replace every layer, one at a time, and write down what became of it."""
        job, observed = self.job, self.samples or {}
        for name in track(list(self.planned), "Converting", job.progress, job.rest):
            planned, old = self.planned[name], job.model.get_submodule(name)
            with torch.no_grad():
                try:
                    new, made = _convert_layer(old, planned, observed.pop(name, None))
                except Exception as error:
                    raise RuntimeError(f"converting the layer {display_name(name)!r} failed: {error}") from error
            if made.bytes_after >= made.bytes_before and not planned.explicit:
                job.record.skipped[name] = (
                    f"too small to pay: {made.bytes_before} bytes would become {made.bytes_after}"
                )
                continue
            times = timing.compare(old, new, job.reached.pop(name, []))
            if times is not None:
                made.microseconds_before, made.microseconds_after = 1e6 * times.before, 1e6 * times.after
                if job.keep_if_faster and times.slower:
                    job.record.skipped[name] = f"{NOT_FASTER}: {times.describe()}"
                    continue
            job.replace(name, old, new)
            job.record.layers[name] = made
            logger.debug("converted %s to %s", display_name(name), planned.scheme)
            # The float weight must be gone before the next layer is made, so nothing may keep hold of the old module.
            del old, new


def _convert_layer(
    old: nn.Module, planned: Planned, sample: calibrate.RowSample | None
) -> tuple[nn.Module, LayerRecord]:
    """The replacement of one layer, and its record."""
    scheme = planned.scheme
    found = calibrate.Found() if sample is None else scheme.search(old, sample)
    new = scheme.build(old, **found.options) if found.replacement is None else found.replacement
    made = LayerRecord(
        scheme=scheme.to_json(),
        label=str(scheme),
        bytes_before=structure.tensor_bytes(old),
        bytes_after=structure.tensor_bytes(new),
        weight_error=scheme.weight_error(old, new),
        output_error=calibrate.output_error(old, new, sample) if found.replacement is None else found.error,
        smoothing=found.exponent,
        note=found.note,
    )
    if sample is not None and sample.rows is None and not made.note:
        made.note = "the calibration data did not reach it"
    return new, made
