"""Compiling kernels for a chip that is not here, and reading what came out."""
