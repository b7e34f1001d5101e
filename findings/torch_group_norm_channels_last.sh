#!/usr/bin/env bash
# PyTorch's group norm of a channels-last image on a CPU takes the variance as the difference of two large numbers.
#
# Versions: torch 2.13.0, CPU.
# Expected: the memory format of an image is a matter of speed. Layer norm, instance norm and group norm take the variance
#   by running means (Welford), so whatever is added to all values costs only what rounding the input costs.
# Seen: `F.group_norm` does so for a contiguous image. For the same image in channels-last order it takes
#   E[x^2] - E[x]^2 in float32. With a mean of 100 standard deviations the error is 400 times as large, with 1,000 it is a
#   tenth of the result, and with 10,000 the result is of another magnitude (contiguous: 5e-4). `F.instance_norm` of the
#   same channels-last image is as exact as before.
# Why it matters: channels-last is the order that convolutions on a CPU are fast in, and what is recommended for them, so a
#   network is changed to it, or a convolution hands it on, and its group norms lose their digits without a word. A
#   converter that lets convolutions hand channels-last images on has to compare its answers with the model's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

torch.manual_seed(0)


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


as_described = True
for mean in (0.0, 100.0, 1000.0, 10000.0):
    x = torch.randn(2, 32, 16, 16) + mean
    last = x.contiguous(memory_format=torch.channels_last)
    exact, exact_instance = F.group_norm(x.double(), 8), F.instance_norm(x.double())
    plain, other = error(F.group_norm(x, 8), exact), error(F.group_norm(last, 8), exact)
    instance = error(F.instance_norm(last), exact_instance)
    print(f"mean {mean:7.0f}: group norm {plain:.1e}, channels-last {other:.1e}; instance norm, channels-last {instance:.1e}")
    as_described &= plain < 1e-3 and instance < 1e-3
    as_described &= {0.0: other < 1e-6, 100.0: other > 100 * plain, 1000.0: other > 0.01, 10000.0: other > 1}[mean]
sys.exit(not as_described)
PYTHON
