"""W8A16 linear: int8 weights, float activations."""
