"""Converted models as files: safetensors and one JSON manifest."""
