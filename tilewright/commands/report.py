"""``tilewright report``: what was done to each layer of a saved model, what that saved and cost.

    tilewright report small/           like layers in one row, as wide as the terminal
    tilewright report small/ --all     every layer
    tilewright report small/ --json    every layer, for programs

The folder is one that ``tilewright.save_model`` wrote. Neither the model nor its weights are needed: all is in the
manifest, but for which implementation serves a layer, which only ``tilewright.report`` of the loaded model can tell.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from rich.console import Console

from tilewright.convert.account import account_of_sizes
from tilewright.convert.checkpoint.manifest import Manifest, read_manifest
from tilewright.convert.report import Report, ReportedLayer
from tilewright.convert.reporting import from_record, whole_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folder", type=Path, help="a folder that save_model wrote")
    parser.add_argument("--all", action="store_true", help="every layer in a row of its own")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace, console: Console | None = None) -> int:
    """Run the command; returns the exit status. Raises CheckpointError, a ValueError."""
    found = of_manifest(options.folder.resolve().name, read_manifest(options.folder))
    text = json.dumps(found.to_json(), indent=1) if options.json else found.details() if options.all else str(found)
    (console or Console()).out(text, highlight=False)
    return 0


def of_manifest(model: str, manifest: Manifest) -> Report:
    """The report of a saved model, here called ``model``."""
    record = manifest.record
    places = [(name, each, False) for name, each in manifest.tensors.items()]
    places += [(alias, manifest.tensors[name], True) for alias, name in manifest.tied.items()]
    account = account_of_sizes(
        [(name, each.kind, math.prod(each.shape) * each.dtype.itemsize, again) for name, each, again in places], record
    )
    found = []
    for name, held in account.layers.items():
        if name in record.layers:
            made = record.layers[name]
            seen = {"bytes_before": made.bytes_before - account.shared[name], "bytes_after": held}
            found.append(from_record(name, manifest.layers[name].module, made, **seen))
        else:
            found.append(ReportedLayer(name, "", "", "", {}, {}, held, held, reason=record.skipped[name]))
    return whole_report(model, found, account.others, record, manifest.training)
