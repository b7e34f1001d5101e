"""Hand-made hostile and broken files: each must be refused, at once, with words that say what is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.convert.checkpoint import safetensors_file
from tilewright.convert.checkpoint.safetensors_file import (
    CheckpointError,
    open_regular,
    read_header,
    read_tensor,
    write_file,
)


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def read(path: Path) -> dict[str, safetensors_file.Entry]:
    with open_regular(path) as file:
        return read_header(file, path)[0]


def entry(begin: int = 0, end: int = 8, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def test_agrees_with_the_safetensors_package(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    torch.manual_seed(0)
    tensors = {
        "float": torch.randn(3, 5),
        "bfloat": torch.randn(7).bfloat16(),
        "half": torch.randn(2, 2).half(),
        "bytes": torch.randint(-128, 127, (3, 3), dtype=torch.int8),
        "words": torch.randint(-(2**31), 2**31 - 1, (5,), dtype=torch.int32),
        "long": torch.arange(3),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "strided": torch.randn(4, 6).t(),
    }
    digests = write_file(tmp_path / "ours.safetensors", tensors, {"format": "pt"})
    theirs = safetensors.load_file(tmp_path / "ours.safetensors")
    assert set(theirs) == set(tensors)
    assert all(torch.equal(theirs[name], tensors[name]) for name in tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path = tmp_path / "theirs.safetensors"
    safetensors.save_file(contiguous, path)
    with open_regular(path) as file:
        entries, start = read_header(file, path)
        for name, tensor in contiguous.items():
            ours = read_tensor(file, path, name, entries[name], start, digests[name])
            assert ours.dtype == tensor.dtype and torch.equal(ours, tensor)


@pytest.mark.parametrize(
    "header, data, message",
    [
        ({"a": entry()}, b"\0" * 7, "truncated: the header describes 8 bytes of data, the file holds 7"),
        ({"a": entry()}, b"\0" * 9, "too long: the header describes 8 bytes"),
        ({"a": entry(), "b": entry(12, 20)}, b"\0" * 20, "'b' begins at byte 12, which leaves a gap"),
        ({"a": entry(4, 12)}, b"\0" * 12, "'a' begins at byte 4, which leaves a gap"),
        ({"a": entry(), "b": entry(4, 12)}, b"\0" * 12, "'b' begins at byte 4, which overlaps"),
        ({"a": entry(), "b": entry()}, b"\0" * 8, "begins at byte 0, which overlaps"),
        ({"a": entry(8, 0)}, b"\0" * 8, "needs 8 bytes, its offsets 8..0 span -8"),
        ({"a": entry(0, 16)}, b"\0" * 16, r"F32 \[2\] needs 8 bytes, its offsets 0..16 span 16"),
        ({"a": entry(-8, 0)}, b"", "not a pair of byte offsets"),
        ({"a": entry(0, 8.0)}, b"\0" * 8, "not a pair of byte offsets"),
        ({"a": {**entry(), "data_offsets": [0]}}, b"", "not a pair of byte offsets"),
        ({"a": entry(shape=(True, 2))}, b"\0" * 8, "not a list of at most 16 sizes"),
        ({"a": entry(shape=(-1, -2))}, b"\0" * 8, "not a list of at most 16 sizes"),
        ({"a": entry(shape="2")}, b"\0" * 8, "not a list of at most 16 sizes"),
        ({"a": entry(shape=(1,) * 17)}, b"\0" * 8, "not a list of at most 16 sizes"),
        ({"a": entry(shape=(2**40, 2**40))}, b"\0" * 8, "needs 4835703278458516698824704 bytes"),
        ({"a": entry(dtype="F8_E4M3", shape=(8,))}, b"\0" * 8, "dtype 'F8_E4M3' is not one of"),
        ({"a": entry(dtype=3)}, b"\0" * 8, "dtype '3' is not one of"),
        ({"a": {**entry(), "extra": 1}}, b"\0" * 8, "and nothing else"),
        ({"a": {"dtype": "F32"}}, b"", "must have dtype, shape and data_offsets"),
        ({"a": [1, 2]}, b"", "must have dtype, shape and data_offsets"),
        ([1, 2], b"", "the header is not a JSON object"),
        ({"__metadata__": {"x": 1}}, b"", "__metadata__ is not an object of strings"),
        (b'{"a": {}, "a": {}}', b"", "the name 'a' occurs twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', b"", "the name 'dtype' occurs twice"),
        (b'{"a": NaN}', b"", "NaN is not a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "an integer has 5000 digits"),
        (b'{"a": ', b"", "not valid JSON"),
        (b'{"\xff": 1}', b"", "not valid JSON"),
        (b"[" * 100_000, b"", "nested too deeply"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", b"", "must have dtype, shape and data_offsets"),
    ],
)
def test_broken_headers(header: Any, data: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "broken.safetensors", header, data)
    with pytest.raises(CheckpointError, match=f"broken.safetensors: .*{message}"):
        read(path)


@pytest.mark.parametrize(
    "content, message", [(b"", "needs 8 bytes, 0 are left"), (b"\1\0\0", "needs 8 bytes, 3 are left")]
)
def test_files_too_short_for_a_header(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "short")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 17 * 2**20, 1000])
def test_a_header_longer_than_the_file_or_the_cap(length: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the header claims"):
        read(write(tmp_path / "long", {"a": entry()}, length=length))


@pytest.mark.parametrize("name_length", [1, 40], ids=["below the byte cap", "above the byte cap"])
def test_a_million_tensors_are_refused_unparsed(
    name_length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each an empty tensor, as in the file that costs other readers 1.3 GB and 17 s."""
    if name_length == 1:
        # The shortest objects there are: 1,050,000 of them fit below 16 MiB.
        text = b"{" + b",".join(b'"%x":{}' % i for i in range(1_050_000)) + b"}"
        assert len(text) < safetensors_file.MAX_HEADER_BYTES
    else:
        one = b'"%040d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        text = b"{" + b",".join(one % i for i in range(1_000_000)) + b"}"
    path = write(tmp_path / "million.safetensors", text)
    monkeypatch.delattr(safetensors_file, "parse_json")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="100000 tensors|more than the 16777216 allowed"):
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * 2**20


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it for reading would wait for ever
    for name, message in [("pipe", "not a regular file"), ("", "not a regular file"), ("none", "No such file")]:
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / name)


def test_a_file_truncated_after_opening_is_an_error_not_a_signal(tmp_path: Path) -> None:
    path = tmp_path / "shrinking.safetensors"
    digest = write_file(path, {"a": torch.zeros(100_000)}, {})["a"]
    with open_regular(path) as file:
        entries, start = read_header(file, path)
        os.truncate(path, start + 1000)
        with pytest.raises(CheckpointError, match="tensor 'a' needs 400000 bytes"):
            read_tensor(file, path, "a", entries["a"], start, digest)


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "flipped.safetensors"
    digest = write_file(path, {"a": torch.zeros(1000)}, {})["a"]
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with open_regular(path) as file:
        entries, start = read_header(file, path)
        with pytest.raises(
            CheckpointError, match="flipped.safetensors: tensor 'a': its bytes do not match the checksum"
        ):
            read_tensor(file, path, "a", entries["a"], start, digest)


def test_bool_bytes_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "bool", {"a": entry(0, 2, "BOOL")}, b"\1\2")
    with open_regular(path) as file:
        entries, start = read_header(file, path)
        with pytest.raises(CheckpointError, match="neither 0 nor 1"):
            read_tensor(file, path, "a", entries["a"], start, hashlib.sha256(b"\1\2").hexdigest())
