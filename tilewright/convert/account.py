"""Every byte of a model: what its layers hold, and what lies outside of them, with the reason why it stays as it is.

Counted are parameters, buffers (also those that no ``state_dict`` has) and tensors in plain attributes of modules, in
lists, tuples and dicts there too. A byte that several tensors lie on, as with tied weights and views, counts where it
comes first in the model's order. Not counted is what a converted layer keeps beside its buffers in the order of a
kernel, and what objects other than modules hold, such as a cache of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tilewright.convert import structure
from tilewright.convert.layers import is_converted
from tilewright.convert.plan import layers_of
from tilewright.convert.record import OtherRecord, Record, join, record_of

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.CrossMapLRN2d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
#: Of a table, by class of module: what it is, in the plural, and why it is left alone.
_BY_MODULE: tuple[tuple[Any, str, str], ...] = (
    (torch.jit.ScriptModule, "scripted modules", "scripted: convert the module it was scripted from"),
    ((nn.Embedding, nn.EmbeddingBag), "embeddings", "looked up, not multiplied"),
    (_NORMS, "norms", "nothing is multiplied with a matrix"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent layers", "its kernel reads all weights at once; no scheme takes it"),
    (nn.MultiheadAttention, "attention weights", "nn.MultiheadAttention reads its weight instead of calling a layer"),
)
_EXPERTS = ("fused experts", "one Parameter holds the weights of all experts; only layers are converted")
_PARAMETERS = ("parameters", "its module reads it itself; only layers are converted")
_BUFFERS = ("buffers", "state of its module, no weight")
_ATTRIBUTES = ("tensor attributes", "a tensor in a plain attribute of its module, no weight")
#: What a tensor is taken for by its kind, in a checkpoint that says no more.
_BY_KIND = {"parameter": _PARAMETERS, "attribute": _ATTRIBUTES}


@dataclass(frozen=True)
class ReportedOther:
    """Tensors outside of layers: all of one module, or one by its own name.

    kind: class of the module. what: what they are, in the plural. bytes: on which nothing before them lies. reason: why
    they are left alone.
    """

    name: str
    kind: str
    what: str
    bytes: int
    reason: str


@dataclass
class Account:
    """layers: bytes of each layer, those of parts of it included, that nothing before it holds. shared: those that
    something before it does. others: what lies outside of layers, in the model's order.
    """

    layers: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    others: list[ReportedOther] = field(default_factory=list)


def account_of(model: nn.Module, layers: Mapping[nn.Module, list[str]] | None = None) -> Account:
    """Where the bytes of ``model`` lie. layers: as of ``layers_of``, if it is known."""
    layers = layers_of(model) if layers is None else layers
    found = Account({names[0]: 0 for names in layers.values()})
    ledger, owners = structure.Ledger(), dict[str, str | None]()
    others: dict[tuple[str, str, str, str], int] = {}
    for prefix, module in model.named_modules():
        above = owners.get(prefix.rpartition(".")[0]) if prefix else None
        owner = owners[prefix] = layers[module][0] if module in layers else above
        for name, kind, tensor in _tensors_of(module):
            size = ledger.add(tensor)
            if owner is not None and kind != "attribute":
                found.layers[owner] += size
            elif size:
                what, reason, whole = _told(prefix, module, kind, tensor)
                key = (prefix if whole else join(prefix, name), type(module).__name__, what, reason)
                others[key] = others.get(key, 0) + size
    found.shared = {
        names[0]: structure.tensor_bytes(module) - found.layers[names[0]] for module, names in layers.items()
    }
    found.others = [
        ReportedOther(name, kind, what, size, reason) for (name, kind, what, reason), size in others.items()
    ]
    return found


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(name, "parameter", "buffer" or "attribute", tensor) of everything that a module itself holds."""
    for table, kind in ((module._parameters, "parameter"), (module._buffers, "buffer")):
        yield from ((name, kind, tensor) for name, tensor in table.items() if tensor is not None)
    if isinstance(module, torch.jit.ScriptModule):
        return
    for name, value in vars(module).items():
        if name not in ("_parameters", "_buffers", "_modules") and not (is_converted(module) and name.startswith("_")):
            yield from ((name, "attribute", tensor) for tensor in _inside(value))


def _inside(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _inside(each)


def _told(prefix: str, module: nn.Module, kind: str, tensor: torch.Tensor) -> tuple[str, str, bool]:
    """What a tensor is, why it is left alone, and whether it goes by the name of its module."""
    if kind == "attribute":
        return *_ATTRIBUTES, False
    for classes, what, reason in _BY_MODULE:
        if isinstance(module, classes):
            return what, reason, True
    name = type(module).__name__.lower()
    if "norm" in name and tensor.dim() < 2:
        return "norms", "nothing is multiplied with a matrix", True
    if kind == "buffer":
        return *_BUFFERS, False
    if tensor.dim() > 1 and ("expert" in f"{prefix.lower()}.{name}" or ("moe" in name and tensor.dim() > 2)):
        return *_EXPERTS, False
    return *_PARAMETERS, False


def recorded(model: nn.Module) -> Record:
    """What is known about the layers of ``model``, and what lies outside of them: for readers that have no model."""
    record = record_of(model)
    record.others = {each.name: OtherRecord(each.kind, each.what, each.reason) for each in account_of(model).others}
    return record


def account_of_sizes(sizes: Iterable[tuple[str, str, int, bool]], record: Record) -> Account:
    """The same of a model that is not there.

    sizes: name, kind as of ``checkpoint.slots`` and bytes of each tensor, and whether it is one that came before.
    """
    layers = dict.fromkeys([*record.layers, *record.skipped], 0)
    found = Account(layers, dict(layers))
    others: dict[str, int] = {}
    told = dict(record.others)
    for tensor, kind, size, again in sizes:
        inside = _prefixes(tensor)
        layer = next((prefix for prefix in inside if prefix in found.layers), None)
        if layer is not None and kind != "attribute":
            (found.shared if again else found.layers)[layer] += size
        if again or (layer is not None and kind != "attribute"):
            continue
        name = next((each for each in (tensor, inside[0]) if each in told), tensor)
        told.setdefault(name, OtherRecord("", *_BY_KIND.get(kind, _BUFFERS)))
        others[name] = others.get(name, 0) + size
    found.others = [
        ReportedOther(name, told[name].kind, told[name].what, size, told[name].reason) for name, size in others.items()
    ]
    return found


def _prefixes(name: str) -> list[str]:
    """Names of the modules that a tensor is in, the innermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
