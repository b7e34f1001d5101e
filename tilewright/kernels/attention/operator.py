"""The card of ``attention``. ``call`` is the short way to what serves it in inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tilewright.kernels.attention.reference import smooth_attention
from tilewright.kernels.dispatch.card import Arguments, Card, everywhere, on_cpu
from tilewright.kernels.dispatch.derivatives import fold_images
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.formats.weight import Draw


def _check(op: str, arguments: Arguments) -> None:
    query, key, value, mask = (arguments[name] for name in ("query", "key", "value", "mask"))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be float, not {tensor.dtype}")
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} must be [batch, heads, length, width], not of shape {list(tensor.shape)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise TypeError(f"{op}: {name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on {query.device}")
    if reason := why_not_shapes(query, key, value):
        raise ValueError(f"{op}: {reason}")
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{op}: mask must be bool or float, not {mask.dtype}")
        full = (*query.shape[:3], key.shape[2])
        try:
            fits = torch.broadcast_shapes(mask.shape, full) == full
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"{op}: mask of shape {list(mask.shape)} does not broadcast to {list(full)}")
    if (sinks := arguments["sinks"]) is not None:
        if not sinks.is_floating_point() or sinks.device != query.device:
            raise TypeError(f"{op}: sinks must be float on {query.device}, not {sinks.dtype} on {sinks.device}")
        if sinks.shape not in (query.shape[1:2], query.shape[:2]):
            raise ValueError(f"{op}: sinks of shape {list(sinks.shape)} do not belong to query {list(query.shape)}")


def why_not_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why the three do not belong together, or None."""
    (batch, heads, _, width), kept = query.shape, key.shape
    if kept[0] != batch or kept[3] != width or value.shape[:3] != kept[:3]:
        return f"query {list(query.shape)}, key {list(kept)} and value {list(value.shape)} do not belong together"
    if heads % kept[1] if kept[1] else heads:
        return f"{heads} heads of query cannot share {kept[1]} heads of key"
    return None


def _problem(op: str, arguments: Arguments, checked: None) -> Problem:
    """m: queries of all heads; n: keys; k: width of a head."""
    query, key = arguments["query"], arguments["key"]
    m, width = query.shape[:-1].numel(), query.shape[-1]
    return Problem(op, m, key.shape[2], width, query.dtype, **device_facts(query.device))


def _fake(arguments: Arguments, checked: None) -> torch.Tensor:
    query, value = arguments["query"], arguments["value"]
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)


def _sample(problem: Problem, draw: Draw) -> dict[str, Any]:
    """One head."""
    lengths = {"query": problem.m, "key": problem.n, "value": problem.n}
    return {name: draw.normal(1, 1, length, problem.k, dtype=problem.x_dtype) for name, length in lengths.items()}


def _fold(arguments: Arguments, dims: Mapping[str, int], size: int) -> Any:
    """The batch becomes part of the first dimension."""
    mask, sinks, dims = arguments["mask"], arguments["sinks"], dict(dims)
    first = arguments["query"].select(dims["query"], 0).shape[0] if "query" in dims else arguments["query"].shape[0]
    if mask is not None:
        if "mask" in dims:
            mask = mask.movedim(dims["mask"], 0)
            missing = 5 - mask.dim()
            dims["mask"] = 0
            mask = mask.reshape(size, *[1] * missing, *mask.shape[1:])
        else:
            mask = mask[(None,) * (4 - mask.dim())]
        leading = (size,) if "mask" in dims else ()
        mask = mask.expand(*leading, first, *mask.shape[-3:])
    if sinks is not None:
        if "sinks" in dims:
            sinks = sinks.movedim(dims["sinks"], 0)
            dims["sinks"] = 0
        leading = (size,) if "sinks" in dims else ()
        sinks = sinks.reshape(*leading, -1, sinks.shape[-1]).expand(*leading, first, sinks.shape[-1])
    given = {**arguments, "mask": mask, "sinks": sinks}
    return fold_images("query", "key", "value", "mask", "sinks")(given, dims, size)


CARDS = (
    Card(
        "attention",
        __package__,
        "(Tensor query, Tensor key, Tensor value, Tensor? mask=None, bool causal=False, float? scale=None, "
        "Tensor? sinks=None) -> Tensor",
        _check,
        _problem,
        _fake,
        _sample,
        Problem("attention", 7, 7, 32, torch.float32),
        implementations=(
            on_cpu("C kernel", ".cpu"),
            everywhere("PyTorch", ".pytorch"),
            everywhere("reference", ".reference"),
        ),
        autocast=("query", "key", "value"),
        differentiable=("query", "key", "value", "mask", "sinks"),
        smooth=smooth_attention,
        fold=_fold,
    ),
)
