"""Searches over a whole model."""
