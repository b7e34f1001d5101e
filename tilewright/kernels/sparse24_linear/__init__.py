"""Linear layers on 2:4 weights, with float, int8 or int4 values."""
