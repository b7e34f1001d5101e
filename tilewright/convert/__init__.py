"""From a model to a smaller, faster one: recipes, the converter, calibration, the report, save and load."""

from tilewright.convert.checkpoint import CheckpointError, load_model, register_checkpoint_format, save_model
from tilewright.convert.compress.pruning import Pruned, prune_magnitude, prune_sparsegpt, prune_wanda
from tilewright.convert.conversion import Conversion, register_conversion
from tilewright.convert.converter import convert_model, revert_model
from tilewright.convert.linears import Linears
from tilewright.convert.network.convolutions import Convolutions
from tilewright.convert.network.step_times import StepTime, StepTimes, step_times
from tilewright.convert.recipes import PRESETS, Recipe, Rule
from tilewright.convert.report import Report
from tilewright.convert.reporting import report
from tilewright.convert.schemes import (
    Fuse,
    Int4WeightOnly,
    Int8ActInt4Weight,
    Int8Dynamic,
    Int8Static,
    Int8StaticInputs,
    Int8WeightOnly,
    Scheme,
    Sparse24,
    Sparse24Conv,
    Sparse24Int4,
    Sparse24Int8,
    register_scheme,
)
from tilewright.convert.search.prune_model import HeldMasks, hold_masks, prune_model
from tilewright.convert.search.prune_search import PruneSearch, search_pruning

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Conversion",
    "Convolutions",
    "Fuse",
    "HeldMasks",
    "Int4WeightOnly",
    "Int8ActInt4Weight",
    "Int8Dynamic",
    "Int8Static",
    "Int8StaticInputs",
    "Int8WeightOnly",
    "Linears",
    "PruneSearch",
    "Pruned",
    "Recipe",
    "Report",
    "Rule",
    "Scheme",
    "Sparse24",
    "Sparse24Conv",
    "Sparse24Int4",
    "Sparse24Int8",
    "StepTime",
    "StepTimes",
    "convert_model",
    "hold_masks",
    "load_model",
    "prune_magnitude",
    "prune_model",
    "prune_sparsegpt",
    "prune_wanda",
    "register_checkpoint_format",
    "register_conversion",
    "register_scheme",
    "report",
    "revert_model",
    "save_model",
    "search_pruning",
    "step_times",
]
