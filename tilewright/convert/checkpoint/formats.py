"""Checkpoints that ``save_model`` did not write: who reads them. ``load_model`` asks where there is no manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

Recognises = Callable[[Path], bool]
Load = Callable[[Path, Callable[[], nn.Module], torch.device], nn.Module]


@dataclass(frozen=True)
class CheckpointFormat:
    """recognises: whether a folder holds one, told by names and headers, before any data is read. load: (folder,
    factory, device) -> the model. factory: makes the unconverted model. What is damaged, hostile or of another model is
    a CheckpointError that names file and tensor; nothing may be unpickled.
    """

    name: str
    recognises: Recognises
    load: Load


_formats: dict[str, CheckpointFormat] = {}


def register_checkpoint_format(name: str, recognises: Recognises, load: Load) -> None:
    """Have ``load_model`` read another kind of checkpoint: see ``CheckpointFormat``. Those registered first are asked
    first. Raises ValueError for a name that is taken.
    """
    if name in _formats:
        raise ValueError(f"a checkpoint format called {name!r} is registered already")
    _formats[name] = CheckpointFormat(name, recognises, load)


def format_of(folder: Path) -> CheckpointFormat | None:
    """The format of what is in ``folder``, None if nobody recognises it."""
    return next((known for known in _formats.values() if known.recognises(folder)), None)
