"""The step that writes what is new to a cache and attends to all of it, against the ``update`` and the attention."""

from __future__ import annotations

import ctypes
import importlib
import types
from typing import Any

import pytest
import torch
from torch import nn

from tilewright.convert.graph import HeldCache, attention_output, update_cache
from tilewright.convert.graph.attention import AttentionConfig
from tilewright.convert.graph.sinks import EAGER
from tilewright.kernels.cpu import native
from tilewright.kernels.cpu.lowering import NotNative
from tilewright.kernels.cpu.recording import HELD, HOLDER, Call
from tilewright.kernels.cpu.replay_cache import CachedAttention
from tilewright.kernels.cpu.steps import Description

transformers = pytest.importorskip("transformers", reason="needs transformers")
for name in ("masking_utils", "modeling_utils"):  # which models import
    importlib.import_module(f"transformers.{name}")

HEADS, KV_HEADS = 6, 2
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def vectors() -> None:
    if native.why_no_native() or not native.function("conv_lanes")():
        pytest.skip("needs vectors")


class Attention(nn.Module):
    """What is told apart of an attention module."""

    num_key_value_groups = HEADS // KV_HEADS

    def __init__(self, with_sinks: bool):
        super().__init__()
        if with_sinks:
            self.config: Any = AttentionConfig(types.SimpleNamespace(_attn_implementation=EAGER), EAGER)


def some(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def masked(kind: str, keys: int) -> torch.Tensor | None:
    seen = torch.rand(2, 1, 1, keys) > 0.3
    if kind == "added":
        return torch.zeros(2, 1, 1, keys).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    return seen if kind == "bytes" else None


@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("mask_kind", ["none", "bytes", "added"])
@pytest.mark.parametrize("length", [5, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_is_that_of_update_and_attention(dtype: torch.dtype, length: int, mask_kind: str, with_sinks: bool) -> None:
    torch.manual_seed(length)
    module, sinks = Attention(with_sinks), some(HEADS, dtype=dtype) if with_sinks else None
    caches = [transformers.DynamicCache() for _ in range(2)]
    past = [some(2, KV_HEADS, length, 24, dtype=dtype) for _ in range(2)]
    for cache in caches:
        cache.update(*past, 0)
    options = {"dropout": 0.0, "scaling": 0.3, "s_aux": sinks} if with_sinks else {"dropout": 0.0, "scaling": 0.3}
    mine, theirs = map(HeldCache, caches)
    live: dict[int, torch.Tensor] = {}
    given: dict[str, Any] = {}
    step = None
    for number in range(4):
        q = some(2, HEADS, 1, 24, dtype=dtype)
        new = [some(2, KV_HEADS, 1, 24, dtype=dtype) for _ in range(2)]
        mask = masked(mask_kind, length + number + 1)
        mask = mask.to(dtype) if mask is not None and mask_kind == "added" else mask
        held = update_cache(theirs, *new, 0)
        expected = attention_output(module, q, *held, mask, **options)
        if step is None:
            memory = [q.clone(), *(each.clone() for each in new), torch.empty_like(expected)]
            live |= {id(a): b for a, b in zip((q, *new, expected), memory, strict=True)}
            step = CachedAttention(
                Call(HOLDER, update_cache.__wrapped__, (*new, 0), {}, held),
                Call(HELD, attention_output.__wrapped__, (module, q, *held, mask), options, expected),
                lambda tensor, live=live: live.get(id(tensor), tensor),
                lambda argument, first=mask: (lambda: given["mask"]) if argument is first else (lambda: argument),
            )
        given["mask"] = mask
        for place, value in zip(memory, (q, *new), strict=False):
            place.copy_(value)
        room = step.room_in(mine)
        assert room is not None and step.take(room)
        steps = (Description * 1)(step.step)
        native.function("run_steps")(ctypes.addressof(steps), 1, torch.get_num_threads())
        assert torch.equal(memory[-1], expected), number
        for a, b in zip((*room[:2], mine.cache.layers[0].keys), (*held, theirs.cache.layers[0].keys), strict=True):
            assert torch.equal(a, b) and a.dtype == dtype


@torch.no_grad()
def test_what_a_cache_gives_in_another_dtype_does_not_fit() -> None:
    module, dtype = Attention(False), torch.bfloat16
    q, new = some(1, HEADS, 1, 16, dtype=dtype), [some(1, KV_HEADS, 1, 16, dtype=dtype) for _ in range(2)]
    held = tuple(some(1, KV_HEADS, 9, 16, dtype=dtype) for _ in range(2))
    y = attention_output(module, q, *held, None, scaling=0.3)

    def made(query: torch.Tensor) -> CachedAttention:
        attend = Call(HELD, attention_output.__wrapped__, (module, query, *held, None), {"scaling": 0.3}, y)
        update = Call(HOLDER, update_cache.__wrapped__, (*new, 0), {}, held)
        return CachedAttention(update, attend, lambda tensor: tensor, lambda argument: lambda: argument)

    assert made(q).take((*held, 8))
    assert not made(q).take((*(each.float() for each in held), 8))
    codes = [torch.zeros(1, KV_HEADS, 9, 16, dtype=torch.int8) for _ in range(2)]
    assert not made(q).take((*codes, 8, torch.zeros(1, KV_HEADS, 9), torch.zeros(1, KV_HEADS, 9), torch.zeros(4, 2, 1)))
    with pytest.raises(NotNative):
        made(q.float())
