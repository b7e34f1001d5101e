"""Operators on tensors: formats, references, implementations and the router between them. Knows nothing about
models.
"""

from tilewright.kernels import ops as _ops  # noqa: F401  (registers torch.ops.tilewright)
