"""What a node of a graph does to memory: whose its result shares, and whose it writes.

PyTorch says it of its own operators, in their schemas. What is not known may share memory with anything that it is
given, keep hold of it, and write into it.
"""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tilewright.convert.graph.caches import update_cache
from tilewright.convert.graph.leaves import SAME_PADDING_FUNCTIONS, has_hooks, is_known
from tilewright.convert.graph.patterns import is_identity
from tilewright.convert.graph.values import IN_PLACE, expect, expect_tensor, is_shape, put
from tilewright.nn import ConvLayer, FoldedBatchNorm

_VIEWING_MODULES = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle)
#: Of aten or methods of tensors, without saying so in a schema.
_SHARING = {
    *(
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
        "broadcast_tensors",
        "cartesian_prod",
        "meshgrid",
        "sum_to_size",
        "einsum",
    ),
    *(
        "unsafe_chunk",
        "unsafe_split",
        "dropout",
        "alpha_dropout",
        "feature_dropout",
        "feature_alpha_dropout",
        "histogramdd",
    ),
    *(
        "channel_shuffle",
        "native_channel_shuffle",
        "pixel_shuffle",
        "pixel_unshuffle",
        "type_as",
        "type",
        "float",
        "double",
    ),
    *(
        "half",
        "bfloat16",
        "int",
        "long",
        "short",
        "bool",
        "char",
        "byte",
        "cpu",
        "cuda",
        "rot90",
        "data",
        "numpy",
        "grad",
    ),
}
#: Of aten, without saying so either: they write statistics in training mode.
_WRITING = {"batch_norm", "instance_norm"}
#: Written in Python, without an operator of their name.
_FRESH_FUNCTIONS = {
    *(F.interpolate, F.upsample, F.normalize, F.local_response_norm, F.softmin, F.lp_pool1d, F.lp_pool2d, F.softsign),
    *(F.tanhshrink, F.gumbel_softmax, F.unfold, F.fold, F.affine_grid, F.pairwise_distance, len),
}
_TENSORS = {"T", "H", "mT", "mH", "data", "real", "imag"}
#: Attributes of a tensor that are no tensors, and methods that give none.
_FACTS = {"dtype", "device", "layout", "requires_grad", "is_cuda", "is_sparse", "is_quantized", "itemsize", "nbytes"}
_NO_TENSORS = {
    "tolist",
    "item",
    "is_floating_point",
    "is_contiguous",
    "data_ptr",
    "stride",
    "storage_offset",
    "get_device",
}


@dataclass(frozen=True)
class Effect:
    """shares: nodes whose memory the result may share. same: the one that the result is, whole and unmoved.

    writes: nodes that are written over. unknown: whether it may do anything to what it is given. tensor: whether the
    result is known to be one. once: whether it must not be done twice.
    """

    shares: tuple[fx.Node, ...] = ()
    same: fx.Node | None = None
    writes: tuple[fx.Node, ...] = ()
    unknown: bool = False
    tensor: bool = False
    once: bool = False


def effect_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Effect:
    """What ``node`` does. modules: by the names that its graph uses."""
    if is_identity(node, modules):
        return _passes(_first(node))
    if node.op == "call_module":
        module = modules.get(str(node.target))
        return _unknown(node) if module is None else _effect_of_module(node, module)
    if node.op == "call_method":
        owner = node.args[0] if node.args else None
        if (
            isinstance(owner, fx.Node)
            and owner.op == "get_attr"
            and isinstance(modules.get(str(owner.target)), ConvLayer)
        ):
            return Effect(tensor=True)  # ``run``
        return _effect_of_method(node, str(node.target))
    if node.op == "call_function":
        return _effect_of_function(node, node.target)
    return Effect(tensor=node.op != "output")


def _first(node: fx.Node) -> fx.Node | None:
    """The first tensor that a call is given."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


def _unknown(node: fx.Node) -> Effect:
    return Effect(shares=tuple(node.all_input_nodes), unknown=True)


def _passes(first: fx.Node | None, *, written: bool = False) -> Effect:
    """The result is the first argument."""
    if first is None:
        return Effect(unknown=True)
    return Effect((first,), first, (first,) if written else (), tensor=True)


def _effect_of_module(node: fx.Node, module: nn.Module) -> Effect:
    if not is_known(module) or has_hooks(module):
        return _unknown(node)
    if isinstance(module, FoldedBatchNorm):
        return _unknown(node)  # it goes on with a module of somebody else's
    if getattr(module, "inplace", False) is True:
        return _passes(_first(node), written=True)
    if isinstance(module, _VIEWING_MODULES):
        return Effect(shares=tuple(node.all_input_nodes), tensor=True)
    several = isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) or getattr(module, "return_indices", False)
    if getattr(module, "max_norm", None) is not None:  # an embedding that scales its weight down
        return _unknown(node)
    return Effect(tensor=not several)


def _effect_of_method(node: fx.Node, name: str) -> Effect:
    first = _first(node)
    if is_shape(node) or name in _NO_TENSORS:
        return Effect()
    if name.endswith("_") and not name.endswith("__"):
        return _passes(first, written=True)
    return _effect_by_name(node, name, is_method=True)


def _effect_of_function(node: fx.Node, target: Any) -> Effect:
    first = _first(node)
    if target in (expect, expect_tensor) or is_shape(node):
        return Effect()
    if target is update_cache:
        return Effect(shares=tuple(node.all_input_nodes), once=True)
    if target in IN_PLACE or target is put:
        return _passes(first, written=True)
    if target is getattr:
        return (
            Effect() if node.args[1] in _FACTS else Effect(tuple(node.all_input_nodes), tensor=node.args[1] in _TENSORS)
        )
    if target is operator.getitem:
        return Effect(shares=tuple(node.all_input_nodes))
    if getattr(target, "__module__", "") == "_operator":
        return Effect(tensor=True)
    out = node.kwargs.get("out")
    if out is not None:
        return _passes(out, written=True) if isinstance(out, fx.Node) else _unknown(node)
    if _given(node, "inplace"):
        return _passes(first, written=True)
    if target in _FRESH_FUNCTIONS:
        return Effect(tensor=target is not len)
    if target in (F.batch_norm, F.instance_norm):
        return _effect_of_norm(node)
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _effect_by_schemas(node, _schemas(target))
    if isinstance(target, type) or str(getattr(target, "__module__", "")).startswith("tilewright."):
        return Effect(shares=tuple(node.all_input_nodes))
    if getattr(target, "__name__", "") in SAME_PADDING_FUNCTIONS:
        return Effect(tensor=True)
    name = _name_in_torch(target)
    if name is None:
        return _unknown(node)
    if name.endswith("_"):
        return _passes(first, written=True)
    return _effect_by_name(node, name)


def _effect_of_norm(node: fx.Node) -> Effect:
    """In training mode, the statistics are written."""
    own = "training" if node.target is F.batch_norm else "use_input_stats"
    if _given(node, own) is False or (_given(node, own) is None and node.target is F.batch_norm):
        return Effect(tensor=True)
    statistics = [_given(node, "running_mean"), _given(node, "running_var")]
    return Effect(writes=tuple(each for each in statistics if isinstance(each, fx.Node)), tensor=True)


def _effect_by_name(node: fx.Node, name: str, is_method: bool = False) -> Effect:
    if name in _SHARING:
        return Effect(shares=tuple(node.all_input_nodes))
    if name in _WRITING or (name == "embedding" and _given(node, "max_norm") is not None):
        return _unknown(node)
    packet = getattr(torch.ops.aten, name, None)
    return _unknown(node) if packet is None else _effect_by_schemas(node, _schemas(packet))


def _effect_by_schemas(node: fx.Node, schemas: tuple[Any, ...]) -> Effect:
    """What the overloads of an operator say together. Variants with ``out=`` were seen before."""
    if not schemas:
        return _unknown(node)
    written: list[Any] = []
    for schema in schemas:
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write and not argument.is_out:
                written.append(node.args[i] if len(node.args) > i else node.kwargs.get(argument.name))
    nodes = tuple({each: None for each in written if isinstance(each, fx.Node)})
    if any(isinstance(each, (list, tuple)) for each in written):
        return _unknown(node)
    returns = [each for schema in schemas for each in schema.returns]
    shares = any(each.alias_info is not None for each in returns)
    tensor = all(len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor" for schema in schemas)
    return Effect(tuple(node.all_input_nodes) if shares else (), None, nodes, tensor=tensor)


@functools.lru_cache(maxsize=2048)
def _schemas(operator_or_packet: Any) -> tuple[Any, ...]:
    """The schemas of an operator that a tensor may come to."""
    if isinstance(operator_or_packet, torch._ops.OpOverload):
        return (operator_or_packet._schema,)
    found = [getattr(operator_or_packet, each)._schema for each in operator_or_packet.overloads()]
    return tuple(schema for schema in found if _is_about_tensors(schema))


def _is_about_tensors(schema: Any) -> bool:
    """Not of lists, of which TorchScript sorts one in place by the name of a tensor's ``sort``; nor with ``out=``."""
    if any(argument.is_out for argument in schema.arguments):
        return False
    first = schema.arguments[0] if schema.arguments else None
    if first is None or "Tensor" not in str(first.type):
        return first is None
    return (
        first.alias_info is None or not str(first.type).startswith("List") or schema.name.startswith("aten::_foreach")
    )


@functools.lru_cache(maxsize=2048)
def _name_in_torch(function: Any) -> str | None:
    """What PyTorch calls a function of its own; None for those of others."""
    name = str(getattr(function, "__name__", ""))
    if any(getattr(space, name, None) is function for space in (torch, F, torch._C._nn)):
        return name
    own = isinstance(function, types.BuiltinFunctionType) and getattr(function, "__module__", None) in (None, "torch")
    return (
        name if own and str(getattr(function, "__self__", "")).startswith(("<module 'torch", "<class 'torch")) else None
    )


@functools.lru_cache(maxsize=2048)
def _parameters(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _given(node: fx.Node, name: str) -> Any:
    """An argument that a call of a Python function is given, by position or by name; None if it is not."""
    if name in node.kwargs:
        return node.kwargs[name]
    names = _parameters(node.target)
    position = names.index(name) if name in names else len(node.args)
    return node.args[position] if position < len(node.args) else None
