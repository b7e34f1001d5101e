#!/usr/bin/env bash
# On a CPU, PyTorch's sum over the batch of channels-last images goes through memory in the order of the result.
#
# Versions: torch 2.13.0, CPU.
# Expected: `x.sum(0)` of images [N, C, H, W] adds whole images, number by number, so the order in which their numbers lie
#   does not matter as long as it is the same in each: N reads and one write for each place. PyTorch's elementwise operators,
#   and `x.sum((2, 3))`, keep the order of a channels-last image and are as fast as for a contiguous one.
# Seen: the result of `x.sum(0)` is contiguous whatever `x` is, and the sum walks in that order, one strided number after
#   another: 30 to 40 times as long as for the same images contiguous, with the same result to the bit.
#   `x.permute(0, 2, 3, 1).sum(0)`, the same numbers under another name, is as fast as it should be. `x.max()` and
#   `x.aminmax()`, which have no order at all, take 4 to 6 times as long; `x.amax()` and `x.sum()` do not.
# Why it matters: what watches a network (observers of a calibration, statistics of activations, corrections of means) looks
#   at whole images between convolutions, which on a CPU are channels-last. There such a sum costs more than the convolution
#   that made the image. Looked at as they lie, by a permutation that costs nothing, they are cheap.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import torch

torch.manual_seed(0)
torch.set_num_threads(1)
plain = torch.randn(8, 64, 56, 56)
last = plain.contiguous(memory_format=torch.channels_last)
calls = {
    "sum(0), contiguous": lambda: plain.sum(0),
    "sum(0), channels-last": lambda: last.sum(0),
    "sum(0), as it lies": lambda: last.permute(0, 2, 3, 1).sum(0),
    "sum((2, 3)), contiguous": lambda: plain.sum((2, 3)),
    "sum((2, 3)), channels-last": lambda: last.sum((2, 3)),
    "aminmax(), contiguous": lambda: plain.aminmax(),
    "aminmax(), channels-last": lambda: last.aminmax(),
}
best = dict.fromkeys(calls, float("inf"))
for _ in range(20):
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        best[name] = min(best[name], time.perf_counter() - start)
for name, seconds in best.items():
    print(f"{name:28} {1e3 * seconds:6.2f} ms")
same = torch.equal(plain.sum(0), last.sum(0))
ratio = best["sum(0), channels-last"] / best["sum(0), contiguous"]
lying = best["sum(0), as it lies"] / best["sum(0), contiguous"]
print(f"channels-last takes {ratio:.1f} times as long, the same numbers as they lie {lying:.1f} times; same bits: {same}")
print(f"strides of the result: {last.sum(0).stride()}")
if not same or ratio < 5 or lying > 3 or last.sum(0).stride() != plain.sum(0).stride():
    sys.exit("sums over the batch of channels-last images are not what they were")
PYTHON
