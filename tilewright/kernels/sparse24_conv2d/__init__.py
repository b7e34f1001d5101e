"""Convolutions in float with weights that are 2:4 along the input channels."""
