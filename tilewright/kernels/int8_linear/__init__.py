"""W8A8 linear: int8 weights and activations."""
