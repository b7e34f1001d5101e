"""A model's layers without its weights: from a config, from headers of safetensors files, or from a function."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from tilewright.convert.checkpoint.safetensors_file import open_regular, read_header

#: What the commands call dtypes of weights and activations.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Weights of two dimensions that are looked up, not multiplied.
_LOOKED_UP = ("embed", "wte", "wpe", "position")


def skeleton(name: str) -> nn.Module:
    """The model that ``name`` stands for, on the meta device wherever that is possible.

    name: a folder with a config.json (transformers), a .safetensors file or a folder of such files, or
    "module:function". Raises ValueError for anything else, and for a name whose parts are missing.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "config.json").is_file() and importlib.util.find_spec("transformers") is not None:
            return _from_config(path)
        files = sorted(path.glob("*.safetensors"))
        if files:
            return _from_headers(files)
        raise ValueError(f"{path} holds neither config.json (and transformers to read it) nor .safetensors files")
    if path.suffix == ".safetensors" and path.is_file():
        return _from_headers([path])
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"{name!r} is no folder, no .safetensors file and not like module:function")
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from error
    try:
        model = build()
    except TypeError as error:
        raise ValueError(f"{name!r} must be callable without arguments: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name!r} returned {type(model).__name__}, not an nn.Module")
    return model.eval().to("meta")


def _from_config(path: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    # Nothing of the folder is executed.
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(config, trust_remote_code=False)
    return model.eval()


def _from_headers(files: Iterable[Path]) -> nn.Module:
    """A linear layer for each matrix of floats called ``*.weight`` that is not a table to look up."""
    layers: dict[str, nn.Module] = {}
    for path in files:
        with open_regular(path) as file:
            entries, _ = read_header(file, path)
        for name, entry in entries.items():
            is_matrix = len(entry.shape) == 2 and entry.dtype.is_floating_point and 0 not in entry.shape
            if is_matrix and name.endswith(".weight") and not any(part in name.lower() for part in _LOOKED_UP):
                n, k = entry.shape
                layer = nn.Linear(k, n, bias=False, device="meta", dtype=entry.dtype)
                layers[name.removesuffix(".weight").replace(".", "/")] = layer
    if not layers:
        raise ValueError("no file holds a matrix of floats called *.weight")
    return nn.ModuleDict(layers)


def example_input(batch: int, tokens: int | None, image: str | None) -> torch.Tensor | None:
    """An input on the meta device: token ids, or images of "C,H,W". Raises ValueError for both, and for nonsense."""
    if tokens is not None and image is not None:
        raise ValueError("an input is either tokens or an image")
    if tokens is not None:
        if tokens < 1:
            raise ValueError(f"an input has at least one token, not {tokens}")
        return torch.empty(batch, tokens, dtype=torch.int64, device="meta")
    if image is None:
        return None
    try:
        channels, height, width = (int(part) for part in image.split(","))
    except ValueError as error:
        raise ValueError(f"{image!r} is not like 3,224,224") from error
    return torch.empty(batch, channels, height, width, device="meta")
