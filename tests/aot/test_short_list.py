"""The list of candidates that comes with the package: its names are those of the kernels' spaces."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from tilewright.autotune.shortlist import shipped
from tilewright.kernels import tuning
from tilewright.kernels.dispatch.problem import Problem

H200 = {"device": "cuda", "capability": (9, 0), "multiprocessors": 132, "device_name": "NVIDIA H200"}


def test_the_shipped_list_names_configurations_that_exist():
    tuning.import_kernels()
    short = shipped("sm_90")
    assert short.target == "sm_90" and len(short.lists) >= 56
    outdated = set(short.outdated())
    for op in ("int4_linear", "int8_linear", "int8_weight_only_linear", "int4_int8_linear"):
        for m in (1, 16, 64, 128):
            group = {"group_size": 128} if op.startswith("int4") else {}
            asked = Problem(op, m, 4096, 4096, torch.bfloat16, **group, **H200)
            for tuned, found in tuning.kernels_for(asked):
                assert tuned.hooks.device(found).arch == short.target  # by which the tuner finds it
                known = short.candidates(tuned, found)
                if known is None:  # only a list of other code may be passed over
                    assert any(key.startswith(f"{tuned.name} | ") for key in outdated), (tuned.name, found)
                    continue
                kept = short.of(tuned, found)["kept"]
                assert len(known) == len(kept) > 0, "a configuration is no longer one of the space"
                serving, _ = tuned.split_candidates(tuned.hooks.representative(found))
                assert set(known) <= set(serving)
    if outdated:
        pytest.skip(f"{len(outdated)} of {len(short.lists)} lists are of other code: `make shortlist` renews them")
