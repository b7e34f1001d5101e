"""Reads and writes the safetensors format: an 8-byte little-endian length, a JSON header, the bytes of the tensors.

The header comes from outside and is not trusted: it is parsed here under caps, before anything else looks at the file,
and must describe exactly the bytes that follow it. Data are read, not mapped: a file that shrinks meanwhile is an
error, not a signal.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 16
MAX_DIGITS = 18  # of an integer in JSON: longer ones are beyond any file, and slow to parse
_CHUNK = 2**20

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that is damaged, hostile or of another model. Says which file and which tensor."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. begin, end: byte offsets from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_json(text: bytes, where: object) -> Any:
    """JSON without its loopholes, or CheckpointError: unique keys, finite numbers of sane length, bounded nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the name {twice[:200]!r} occurs twice")
        return found

    def integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"an integer has {len(digits)} digits")
        return int(digits)

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not a number that JSON knows")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_int=integer, parse_constant=constant)
    except RecursionError:
        raise CheckpointError(f"{where}: the JSON is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises CheckpointError if it is missing or is no regular file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # asked before, as opening a device or a pipe does something
            raise CheckpointError(f"{path}: not a regular file")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # and of what was opened, if somebody exchanged it
        file.close()
        raise CheckpointError(f"{path}: not a regular file")
    return file


def read_into(file: BinaryIO, into: memoryview, path: Path, what: str) -> None:
    """Fill ``into`` from where the file stands. Raises CheckpointError if there is less."""
    got = 0
    while got < len(into):
        step = file.readinto(into[got:])  # type: ignore[attr-defined]
        if not step:
            raise CheckpointError(f"{path}: truncated: {what} needs {len(into)} bytes, {got} are left")
        got += step


def read_exactly(file: BinaryIO, count: int, path: Path, what: str) -> bytes:
    """``count`` bytes from where the file stands. Raises CheckpointError if there are fewer."""
    data = bytearray(count)
    read_into(file, memoryview(data), path, what)
    return bytes(data)


def read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Entry], int]:
    """The tensors of an open file by name, and the offset at which its data begin.

    Raises CheckpointError unless the header obeys the caps, names every tensor once, gives each a known dtype and the
    bytes that its shape needs, and covers the rest of the file without gap or overlap.
    """
    file_size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(read_exactly(file, 8, path, "the length of the header"), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: the header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
    if length > file_size - 8:
        raise CheckpointError(f"{path}: truncated: the header claims {length} bytes, the file has {file_size}")
    text = read_exactly(file, length, path, "the header")
    # Counted before parsing: building a million objects only to refuse them takes seconds and gigabytes.
    if text.count(b"{") > MAX_TENSORS + 2:
        raise CheckpointError(f"{path}: the header holds more than {MAX_TENSORS} tensors")
    header = parse_json(text, path)
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not an object of strings")
    entries = {name: _entry(name, fields, path) for name, fields in header.items()}
    _check_cover(entries, file_size - 8 - length, path)
    return entries, 8 + length


def _entry(name: str, fields: Any, path: Path) -> Entry:
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype {str(dtype)[:50]!r} is not one of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{where}: the shape is not a list of at most {MAX_DIMENSIONS} sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets is not a pair of byte offsets")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise CheckpointError(
            f"{where}: {dtype} {shape} needs {needed} bytes, its offsets {begin}..{end} span {end - begin}"
        )
    return Entry(DTYPES[dtype], tuple(shape), begin, end)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_cover(entries: Mapping[str, Entry], data_bytes: int, path: Path) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            problem = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {name[:200]!r} begins at byte {entry.begin}, which {problem} ({position})"
            )
        position = entry.end
    if position != data_bytes:
        what = "truncated" if data_bytes < position else "too long"
        raise CheckpointError(
            f"{path}: {what}: the header describes {position} bytes of data, the file holds {data_bytes}"
        )


def read_tensor(file: BinaryIO, path: Path, name: str, entry: Entry, data_start: int, sha256: str) -> torch.Tensor:
    """One tensor on the CPU. Raises CheckpointError if the file is too short or the checksum is another."""
    file.seek(data_start + entry.begin)
    data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
    view = data.numpy().data
    read_into(file, view, path, f"tensor {name!r}")
    if hashlib.sha256(view).hexdigest() != sha256:
        raise CheckpointError(f"{path}: tensor {name!r}: its bytes do not match the checksum in the manifest")
    if entry.dtype == torch.bool and data.numel() and data.amax() > 1:
        raise CheckpointError(f"{path}: tensor {name!r}: a byte of a BOOL tensor is neither 0 nor 1")
    return data.view(entry.dtype).reshape(entry.shape)


def write_file(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Write a safetensors file, tensor by tensor, and flush it to the disk. Returns name -> sha256 in hexadecimal."""
    # Wide dtypes first, so that every tensor is aligned to its own element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name in names:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES or len(tensors) > MAX_TENSORS:
        raise ValueError(f"{len(tensors)} tensors are too many for one file")
    digests = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            digest = hashlib.sha256()
            data = _bytes_of(tensors[name])
            for begin in range(0, len(data), _CHUNK):
                # A copy, so that the checksum is of what is written, whoever writes into the tensor meanwhile.
                chunk = bytes(data[begin : begin + _CHUNK])
                digest.update(chunk)
                file.write(chunk)
            digests[name] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return digests


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
