"""Tilewright makes an existing PyTorch model smaller and faster in one line.

import tilewright as tw

model = tw.convert_model(model, "int8")
print(tw.report(model))
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from tilewright import autotune, kernels, nn
from tilewright.backend import compile_report
from tilewright.commands.diagnosis import diagnose
from tilewright.convert import (
    CheckpointError,
    Fuse,
    Int4WeightOnly,
    Int8ActInt4Weight,
    Int8Dynamic,
    Int8Static,
    Int8StaticInputs,
    Int8WeightOnly,
    Recipe,
    Sparse24,
    Sparse24Conv,
    Sparse24Int4,
    Sparse24Int8,
    convert_model,
    hold_masks,
    load_model,
    prune_model,
    report,
    revert_model,
    save_model,
    search_pruning,
    step_times,
)
from tilewright.deploy import export_onnx, export_package

if TYPE_CHECKING:
    from tilewright.convert.graph.int8_cache import Int8Cache as Int8Cache


def __getattr__(name: str) -> Any:
    """``Int8Cache``, which needs transformers, when it is asked for."""
    if name == "Int8Cache":
        from tilewright.convert.graph.int8_cache import Int8Cache

        return Int8Cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


try:
    __version__ = version("tilewright")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "CheckpointError",
    "Fuse",
    "Int4WeightOnly",
    "Int8ActInt4Weight",
    "Int8Dynamic",
    "Int8Static",
    "Int8StaticInputs",
    "Int8WeightOnly",
    "Recipe",
    "Sparse24",
    "Sparse24Conv",
    "Sparse24Int4",
    "Sparse24Int8",
    "autotune",
    "compile_report",
    "convert_model",
    "diagnose",
    "export_onnx",
    "export_package",
    "hold_masks",
    "kernels",
    "load_model",
    "nn",
    "prune_model",
    "report",
    "revert_model",
    "save_model",
    "search_pruning",
    "step_times",
]
