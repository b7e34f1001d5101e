"""Tilewright: what ``convert_model`` makes of the float model."""

from __future__ import annotations

from pathlib import Path

from bench.peers import networks
from bench.peers.contestants import Prepared
from bench.peers.pytorch import prepared


def _converted(name: str, shape: tuple[int, ...], decode: bool, recipe: str) -> Prepared:
    import tilewright as tw

    # Convolutional networks are calibrated; linear layers quantise their input on the fly.
    data = [x for (x,) in networks.calibration(name)] if name in networks.CONVOLUTIONAL and recipe != "fuse" else None
    # llama.cpp stores the decoder's head in as few bits as all else.
    model = tw.convert_model(
        networks.network(name), recipe, calibration_data=data, heads=name == networks.DECODER, progress=False
    )
    return prepared(name, model, shape, decode)


def fused(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """float32, batch-norms and activations in the convolutions."""
    return _converted(name, shape, decode, "fuse")


def int8(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """int8 weights and activations."""
    return _converted(name, shape, decode, "int8")


def int8_weight_only(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """int8 weights, float activations."""
    return _converted(name, shape, decode, "int8-weight-only")


def int4(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """int4 weights in groups of 128, float activations."""
    return _converted(name, shape, decode, "int4")


def w4a8(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """int4 weights in groups of 128, int8 activations."""
    return _converted(name, shape, decode, "w4a8")
