"""Converted models as files: safetensors and one JSON manifest."""

from tilewright.convert.checkpoint.native import load_model, save_model
from tilewright.convert.checkpoint.safetensors_file import CheckpointError

__all__ = ["CheckpointError", "load_model", "save_model"]
