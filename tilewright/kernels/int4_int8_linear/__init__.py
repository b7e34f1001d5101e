"""W4A8 linear: int4 weights, int8 activations."""
