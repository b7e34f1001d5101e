"""Converted models as files: safetensors and one JSON manifest."""

from tilewright.convert.checkpoint.formats import register_checkpoint_format
from tilewright.convert.checkpoint.native import load_model, save_model
from tilewright.convert.checkpoint.safetensors_file import CheckpointError
