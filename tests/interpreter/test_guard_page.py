from __future__ import annotations

import torch
import triton
import triton.language as tl

from tests.interpreter.guard_page import guarded, survives


@triton.jit
def read_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0))


def test_a_read_past_the_end_is_noticed_and_one_within_is_not():
    x, out = guarded(torch.arange(100.0)), torch.empty(128)
    assert survives(lambda: read_kernel[(1,)](x, out, 100, BLOCK=128))
    assert not survives(lambda: read_kernel[(1,)](x, out, 101, BLOCK=128))
