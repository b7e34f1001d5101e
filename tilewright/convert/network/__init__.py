"""Convolutions as one program: what is fused, what stays int8 between layers, what is replayed."""
