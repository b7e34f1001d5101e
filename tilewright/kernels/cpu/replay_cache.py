"""The update of a cache and the attention to what it holds, as a step between those before and behind them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch

from tilewright.kernels.cpu import attention, native, steps
from tilewright.kernels.cpu.lowering import NotNative
from tilewright.kernels.cpu.memory import scratch
from tilewright.kernels.cpu.recording import ATTENTION_OF, ROOM_OF, Call
from tilewright.kernels.cpu.replay_checks import is_same
from tilewright.kernels.cpu.row_steps import describe
from tilewright.kernels.cpu.steps import Description
from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.problem import Problem

#: What the router calls the implementation whose code the step shares.
_C_KERNEL = "C kernel"
#: Floats of scratch memory are asked for in multiples of this, so that a growing number of keys asks for the same.
_STEP = 1 << 14

#: Keys, values, the first position to be written; and of int8 codes the scales of keys and values, and the place of the
#: errors of what is written (see ``errors`` in attention.h): such a one also has a method ``write``.
Room = Any


class CachedAttention:
    """A step that writes new keys and values behind those of a cache, which has made room for them, and attends to all.

    update, attend: a recorded call of a holder, and of what reads what it gave. live: where a recorded tensor is in a
    replay. source: what gives an argument in a replay. Raises NotNative.
    """

    def __init__(
        self,
        update: Call,
        attend: Call,
        live: Callable[[torch.Tensor], torch.Tensor],
        source: Callable[[Any], Callable[[], Any]],
    ):
        asked = ATTENTION_OF[attend.function](*attend.args, **attend.kwargs)
        if asked is None or type(update.result) is not tuple or len(update.result) != 2:
            raise NotNative
        query, key, value, mask, scale, sinks = asked
        if key is not update.result[0] or value is not update.result[1] or len(update.args) < 3:
            raise NotNative
        q, y, new_key, new_value = map(live, (query, attend.result, *update.args[:2]))
        batch, heads, queries, width = q.shape
        keys = attention.routed_keys(queries, key.shape[2])
        problem = Problem("attention", batch * heads * queries, keys, width, q.dtype)
        if queries > attention.FEW_QUERIES or attention.why_not(problem) or router.route(problem).name != _C_KERNEL:
            raise NotNative
        if any(t.dtype != q.dtype or t.stride(3) != 1 for t in (q, y, new_key, new_value)):
            raise NotNative
        if not y.is_contiguous() or new_key.shape[2] != queries or heads % max(new_key.shape[1], 1):
            raise NotNative
        self._room, self._rest, self._options = ROOM_OF[update.function], update.args[2:], update.kwargs
        self._new, self._mask, self._sinks = (new_key, new_value), source(mask), source(sinks)
        self._recorded = list(map(id, update.result))
        self._size = batch, heads, queries
        self._done = torch.empty(batch * new_key.shape[1], dtype=torch.int32)
        self._keep = q, y
        self._job = attention.Job(
            q=q.data_ptr(),
            y=y.data_ptr(),
            new_k=new_key.data_ptr(),
            new_v=new_value.data_ptr(),
            batch=batch,
            heads=heads,
            kv_heads=new_key.shape[1],
            queries=queries,
            width=width,
            value_width=new_value.shape[3],
            q_stride=q.stride()[:3],
            new_k_stride=new_key.stride()[:3],
            new_v_stride=new_value.stride()[:3],
            scale=1 / math.sqrt(max(width, 1)) if scale is None else scale,
            threads=torch.get_num_threads(),
            done=self._done.data_ptr(),
            bfloat16=q.dtype == torch.bfloat16,
        )
        self.step: Description = describe(steps.ATTENTION, self._job)

    def room_in(self, holder: Any) -> Room | None:
        """What ``holder`` gives, having taken what is new, which is still to be written; None if it does not do so."""
        room: Room | None = self._room(holder, *self._new, *self._rest, **self._options)
        return room

    def take(self, room: Room, count: int | None = None) -> bool:
        """Prepare the step; False where it does not fit what it is to read. count: how many positions to write."""
        job, (keys, values, first, *coded), mask = self._job, room, self._mask()
        if keys.stride(3) != 1 or values.stride(3) != 1:
            return False
        held = self._keep[0].dtype
        if any(tensor.dtype != held for tensor in room[:2]) if not coded else held != torch.float32:
            return False
        batch, heads, queries = self._size
        length = keys.shape[2]
        if mask is None:
            job.mask = None
        else:
            full = batch, heads, queries, length
            if mask.dtype == torch.bfloat16:
                mask = self._widened_mask = mask.float()
            if mask.dtype not in (torch.bool, torch.float32) or mask.dim() != 4 or mask.stride(3) > 1:
                return False
            if mask.shape != full:
                if any(size not in (1, wanted) for size, wanted in zip(mask.shape, full, strict=True)):
                    return False
                mask = mask.expand(full)
            job.mask, job.mask_stride = mask.data_ptr(), mask.stride()
            job.mask_is_bytes = mask.dtype == torch.bool
        if (sinks := self._sinks()) is None:
            job.sinks = None
        else:
            sinks = self._widened_sinks = sinks.float()
            job.sinks, job.sinks_stride = sinks.data_ptr(), sinks.expand(batch, heads).stride()
        if coded:
            key_scales, value_scales, errors = coded
            job.k_scale, job.v_scale, job.errors = (tensor.data_ptr() for tensor in coded)
            job.k_scale_stride, job.v_scale_stride = key_scales.stride()[:2], value_scales.stride()[:2]
            job.errors_stride = errors.stride()[:2]
        else:
            job.k_scale = None
        job.k, job.v, job.keys = keys.data_ptr(), values.data_ptr(), length
        job.k_stride, job.v_stride = keys.stride()[:3], values.stride()[:3]
        job.new_first, job.new_count = first, queries if count is None else count
        floats = native.function("attention_scratch")(ctypes.addressof(job))
        job.scratch = scratch((-(-floats // _STEP) * _STEP,), torch.float32, "attention").data_ptr()
        return True

    def written(self, room: Room) -> dict[int, torch.Tensor]:
        """What a holder gives, by what was recorded of it, having written what the step would where it does not fit."""
        if len(room) > 3:
            return dict(zip(self._recorded, room.write(*self._new), strict=True))
        for whole, new in zip(room[:2], self._new, strict=True):
            whole[:, :, room[2] : room[2] + new.shape[2]] = new
        return dict(zip(self._recorded, room[:2], strict=True))

    def is_right(self, expected: torch.Tensor, held: dict[int, torch.Tensor]) -> bool:
        """Whether the step gives what was recorded, for what was ``held`` then; the place of its result is left so."""
        keys, values = map(held.__getitem__, self._recorded)
        if not self.take((keys, values, 0), 0):
            return True  # which it is not to do
        again = (Description * 1)(self.step)
        native.function("run_steps")(ctypes.addressof(again), 1, torch.get_num_threads())
        place = self._keep[1]
        same = is_same(place, expected)
        place.copy_(expected)
        return same
