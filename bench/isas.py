"""Holds all libraries of a process, and of those that it starts, to fewer instructions than the processor has."""

from __future__ import annotations

import os

#: What oneDNN, in PyTorch and OpenVINO, and MKL call an instruction set of ours.
LIBRARIES = {
    "avx512_bf16": ("AVX512_CORE_BF16", "AVX512_E4"),
    "avx512_vnni": ("AVX512_CORE_VNNI", "AVX512_E1"),
    "avx2": ("AVX2", "AVX2"),
}


def hold(isa: str) -> None:
    """Must come before the libraries are first used. ``isa``: one of ``LIBRARIES``; of others nothing is held back."""
    os.environ["TILEWRIGHT_CPU_ISA"] = isa
    if isa in LIBRARIES:
        os.environ["ONEDNN_MAX_CPU_ISA"], os.environ["MKL_ENABLE_INSTRUCTIONS"] = LIBRARIES[isa]
