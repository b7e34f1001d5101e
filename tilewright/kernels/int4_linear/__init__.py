"""W4A16 linear: int4 weights, float activations."""
