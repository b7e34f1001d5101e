"""The operator ``tilewright::attention``: what it promises PyTorch, its errors, and which calls it may stand in for."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_attention import MASKS, mask_of, operands
from tilewright.kernels.attention import call


@pytest.mark.parametrize("mask", MASKS)
def test_opcheck(mask: str):
    q, k, v = operands(2, 4, 2, 5, 7, 8, 12)
    arguments = (q, k, v, mask_of(mask, 2, 4, 5, 7))
    torch.library.opcheck(torch.ops.tilewright.attention.default, arguments)
    torch.library.opcheck(torch.ops.tilewright.attention.default, arguments, {"sinks": torch.randn(4)})
    empty = operands(0, 4, 2, 5, 7, 8, 12)
    torch.library.opcheck(torch.ops.tilewright.attention.default, empty)


@pytest.mark.parametrize(
    "shapes, words",
    [
        (((2, 3, 4), (2, 3, 4), (2, 3, 4)), "query must be"),
        (((1, 3, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "3 heads"),
        (((1, 2, 4, 8), (1, 2, 4, 9), (1, 2, 4, 8)), "belong together"),
        (((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 5, 8)), "belong together"),
        (((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), (3, 1, 1, 1)), "broadcast"),
    ],
)
def test_bad_shapes_are_errors(shapes: tuple[tuple[int, ...], ...], words: str):
    with pytest.raises(ValueError, match=words):
        torch.ops.tilewright.attention(*map(torch.randn, shapes))


def test_bad_sinks_are_errors():
    q = torch.randn(2, 4, 3, 8)
    for shape in ((2,), (4, 2), (2, 4, 1), ()):
        with pytest.raises(ValueError, match="sinks of shape"):
            torch.ops.tilewright.attention(q, q, q, sinks=torch.randn(shape))
        assert not call.supports(q, q, q, None, False, torch.randn(shape))
    with pytest.raises(TypeError, match="sinks must be float"):
        torch.ops.tilewright.attention(q, q, q, sinks=torch.ones(4, dtype=torch.int64))
    with torch.no_grad():
        assert call.supports(q, q, q, None, False, torch.randn(4).requires_grad_())
    assert not call.supports(q, q, q, None, False, torch.randn(4).requires_grad_())


def test_bad_dtypes_are_errors():
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(TypeError, match="key is torch.float64"):
        torch.ops.tilewright.attention(q, q.double(), q)
    with pytest.raises(TypeError, match="value must be float"):
        torch.ops.tilewright.attention(q, q, q.int())
    with pytest.raises(TypeError, match="mask must be bool or float"):
        torch.ops.tilewright.attention(q, q, q, q[..., :2].int())


def test_takes_only_what_it_can_replace():
    q, k, v = operands(1, 2, 2, 3, 5, 8, 8)
    with torch.no_grad():
        assert call.supports(q, k, v, None, True)
        assert call.supports(q, k, v, torch.randn(1, 1, 3, 5), False)
        assert not call.supports(q, k, v, torch.randn(1, 1, 3, 5), True)
        assert not call.supports(q, k, v, torch.randn(1, 1, 4, 5), False)
        assert not call.supports(q.bfloat16(), k, v, None, False)
        halves = [t.bfloat16() for t in (q, k, v)]
        assert call.supports(*halves, None, True) and not call.supports(*[t.half() for t in halves], None, True)
        assert not call.supports(halves[0].repeat(1, 1, 2, 1), *halves[1:], None, False), "few queries alone"
        assert not call.supports(q.to("meta"), k.to("meta"), v.to("meta"), None, False)
        with torch.autocast("cpu"):
            assert not call.supports(q, k, v, None, False)
        assert torch.func.vmap(lambda x: torch.tensor(call.supports(x, k, v, None, False)), out_dims=None)(
            q[None]
        ).logical_not()
    assert not call.supports(q.requires_grad_(), k, v, None, False)
