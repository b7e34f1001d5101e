"""Operators on tensors: formats, references, implementations and the router between them. Knows nothing about
models.
"""

from tilewright.kernels import conv_ops as _conv_ops  # noqa: F401  (registers torch.ops.tilewright)
from tilewright.kernels import ops as _ops  # noqa: F401  (registers torch.ops.tilewright)
