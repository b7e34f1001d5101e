"""What kernels share that issue an instruction of a whole warp through inline assembly: each thread holds its own
registers of it, loaded in 16 bytes at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Bytes that the addresses of weights and of rows of x must be a multiple of.
ALIGNMENT = 16


@triton.jit
def split_registers(registers):
    """[threads, 4] as four vectors [threads]; thread i keeps element i of each."""
    even, odd = tl.split(tl.reshape(registers, (registers.shape[0], 2, 2)))
    r0, r2 = tl.split(even)
    r1, r3 = tl.split(odd)
    return r0, r1, r2, r3


def words_of(x: torch.Tensor) -> torch.Tensor:
    """x [M, K], rows of a multiple of 64 bytes, as int32 words [M, ...]: a view where the compiler will know that its
    rows are aligned, which takes strides of a multiple of 16 words, else of a copy.
    """
    words = 16 * 4 // x.element_size()
    aligned = x.stride(1) == 1 and x.stride(0) % words == 0 and (x.is_meta or x.data_ptr() % ALIGNMENT == 0)
    return (x if aligned else x.clone(memory_format=torch.contiguous_format)).view(torch.int32)


def check_registers(instruction: str, inline_ptx: bool, **weights: torch.Tensor) -> None:
    """Raise ValueError for a weight that is not 16-byte aligned, and where there is no inline PTX: ``instruction`` is
    issued in no other way.
    """
    if not inline_ptx:
        raise ValueError(f"{instruction} is issued through inline PTX, which this target does not take")
    for name, tensor in weights.items():
        if not tensor.is_meta and tensor.data_ptr() % ALIGNMENT:
            raise ValueError(f"the {name} of a weight in fragment order must be aligned to {ALIGNMENT} bytes")
