"""The manifest of a checkpoint, ``tilewright.json``: what was converted and how, and where every tensor lies.

Like the headers of the data files it comes from outside: everything is checked here, before anything is built from it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tilewright.convert.checkpoint.safetensors_file import (
    DTYPE_NAMES,
    DTYPES,
    MAX_TENSORS,
    CheckpointError,
    Entry,
    open_regular,
    parse_json,
    read_exactly,
)
from tilewright.convert.checkpoint.slots import KINDS
from tilewright.convert.record import Record

FILE_NAME = "tilewright.json"
FORMAT = "tilewright"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 64 * 2**20
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Layer:
    """One converted layer. module: class name. config: its constructor's arguments."""

    module: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """One tensor. kind: see ``slots.KINDS``. requires_grad: of a parameter."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    sha256: str
    kind: str
    requires_grad: bool = False

    def why_not(self, entry: Entry) -> str | None:
        """How the header of the data file contradicts this, or None."""
        if (entry.dtype, entry.shape) == (self.dtype, self.shape):
            return None
        return f"is {entry.dtype} {list(entry.shape)} in the file, {self.dtype} {list(self.shape)} in the manifest"


@dataclass
class Manifest:
    """layers, tensors: by name. tied: alias -> name in ``tensors``. training: the root's mode.

    differing: names of the modules in the other mode. fused: activation -> the layer that applies it. folded:
    batch-norm -> the convolution that holds it.
    """

    record: Record
    layers: dict[str, Layer]
    tensors: dict[str, Stored]
    tied: dict[str, str] = field(default_factory=dict)
    training: bool = False
    differing: list[str] = field(default_factory=list)
    fused: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)

    def shards(self) -> dict[str, list[str]]:
        """Names of the tensors in each data file."""
        found: dict[str, list[str]] = {}
        for name, stored in self.tensors.items():
            found.setdefault(stored.shard, []).append(name)
        return found

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors as they are called now."""
        self.tensors = {names.get(name, name): stored for name, stored in self.tensors.items()}
        self.tied = {names.get(alias, alias): names.get(name, name) for alias, name in self.tied.items()}

    def to_bytes(self) -> bytes:
        """The JSON text."""
        data = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "training": self.training,
            "differing": self.differing,
            "layers": {name: vars(layer) for name, layer in self.layers.items()},
            "record": self.record.to_json(),
            "fused": self.fused,
            "folded": self.folded,
            "tied": self.tied,
            "tensors": {
                name: {**vars(stored), "dtype": DTYPE_NAMES[stored.dtype], "shape": list(stored.shape)}
                for name, stored in self.tensors.items()
            },
        }
        return json.dumps(data, indent=1, allow_nan=False).encode()


def read_manifest(directory: Path) -> Manifest:
    """The manifest in a folder. Raises CheckpointError if it is missing, damaged, hostile or of another version."""
    path = directory / FILE_NAME
    with open_regular(path) as file:
        return parse_manifest(file, path)


def parse_manifest(file: BinaryIO, path: Path) -> Manifest:
    """The manifest in an open file. Raises as ``read_manifest``."""
    size = os.fstat(file.fileno()).st_size  # not that of the path, which may be another file by now
    if size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path}: {size} bytes, more than the {MAX_MANIFEST_BYTES} allowed")
    data = parse_json(read_exactly(file, size, path, "the manifest"), path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a Tilewright manifest")
    if data.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: version {data.get('version')!r} of the format, this Tilewright reads version {FORMAT_VERSION}"
        )
    try:
        return _manifest(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {error}") from error


def _manifest(data: dict[str, Any]) -> Manifest:
    tables = {name: data[name] for name in ("layers", "tensors", "tied", "fused", "record")}
    tables["folded"] = data.get("folded", {})  # of older files, which hold no convolutions
    for name, table in tables.items():
        _require(isinstance(table, dict), f"{name!r} is not an object")
    _require(len(tables["tensors"]) + len(tables["tied"]) <= MAX_TENSORS, f"more than {MAX_TENSORS} tensors")
    _require(type(data["training"]) is bool, "'training' is not true or false")
    _require(_strings(data["differing"]), "'differing' is not a list of names")
    for name in ("tied", "fused", "folded"):
        _require(_strings(list(tables[name].values())), f"{name!r} does not map names to names")
    tensors = {name: _stored(name, fields) for name, fields in tables["tensors"].items()}
    for alias, name in tables["tied"].items():
        _require(name in tensors, f"{alias!r} is tied to {name!r}, which is not stored")
        _require(alias not in tensors, f"{alias!r} is both stored and tied")
    layers = {name: _layer(name, fields) for name, fields in tables["layers"].items()}
    record = Record.from_json(tables["record"])
    ties, fused, folded = tables["tied"], tables["fused"], tables["folded"]
    return Manifest(record, layers, tensors, ties, data["training"], data["differing"], fused, folded)


def _stored(name: str, fields: Any) -> Stored:
    keys = {"dtype", "shape", "shard", "sha256", "kind", "requires_grad"}
    _require(
        isinstance(fields, dict) and set(fields) == keys, f"tensor {name!r}: its keys are not {', '.join(sorted(keys))}"
    )
    shard, shape = fields["shard"], fields["shape"]
    _require(
        isinstance(shard, str) and _SHARD.fullmatch(shard) is not None, f"tensor {name!r}: {shard!r} is no file name"
    )
    _require(fields["dtype"] in DTYPES, f"tensor {name!r}: unknown dtype {fields['dtype']!r}")
    _require(fields["kind"] in KINDS, f"tensor {name!r}: unknown kind {fields['kind']!r}")
    _require(isinstance(shape, list) and all(type(size) is int for size in shape), f"tensor {name!r}: no shape")
    _require(_SHA256.fullmatch(fields["sha256"]) is not None, f"tensor {name!r}: no SHA-256 checksum")
    _require(type(fields["requires_grad"]) is bool, f"tensor {name!r}: requires_grad is not true or false")
    dtype = DTYPES[fields["dtype"]]
    _require(dtype.is_floating_point or not fields["requires_grad"], f"tensor {name!r}: {dtype} takes no gradient")
    return Stored(**{**fields, "dtype": dtype, "shape": tuple(shape)})


def _layer(name: str, fields: Any) -> Layer:
    _require(
        isinstance(fields, dict) and set(fields) == {"module", "config"}, f"layer {name!r}: needs module and config"
    )
    _require(isinstance(fields["module"], str), f"layer {name!r}: its module is not a name")
    _require(isinstance(fields["config"], dict), f"layer {name!r}: its config is not an object")
    return Layer(fields["module"], fields["config"])


def _strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(message)
