#!/usr/bin/env bash
# On a CPU, PyTorch's `aminmax` over the last dimension takes several times as long as `abs().amax`, which reads twice.
#
# Versions: torch 2.13.0, CPU, one thread.
# Expected: `torch.aminmax` was added so that quantisation reads a tensor once: over a whole tensor it is as fast as one
#   reduction. So for the range of each row it should beat `x.abs().amax(-1)`, which writes a second tensor and reads that.
# Seen: `aminmax(x, dim=-1)` takes four to six times as long as `x.abs().amax(-1)`, and so does the norm that says the
#   same in one call, `torch.linalg.vector_norm(x, inf, dim=-1)`. `aminmax(x)` without a dimension is fast.
# Why it matters: observers with a range for each output channel (torch.ao's PerChannelMinMaxObserver among them) call
#   `aminmax` with a dimension, and calibration spends its time there. Whoever needs symmetric ranges alone had better take
#   the magnitude first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import torch

torch.set_num_threads(1)
x = torch.randn(1024, 1024)
calls = {
    "x.abs().amax(-1)": lambda: x.abs().amax(-1),
    "aminmax(x, dim=-1)": lambda: torch.aminmax(x, dim=-1),
    "vector_norm(x, inf, dim=-1)": lambda: torch.linalg.vector_norm(x, float("inf"), dim=-1),
    "aminmax(x)": lambda: torch.aminmax(x),
}
fastest = dict.fromkeys(calls, float("inf"))
for _ in range(60):
    for name, call in calls.items():
        begin = time.perf_counter()
        call()
        fastest[name] = min(fastest[name], time.perf_counter() - begin)
usual = fastest["x.abs().amax(-1)"]
for name, seconds in fastest.items():
    print(f"{name:28} {1e6 * seconds:7.0f} us, {seconds / usual:.2f} times x.abs().amax(-1)")
slow = min(fastest["aminmax(x, dim=-1)"], fastest["vector_norm(x, inf, dim=-1)"])
sys.exit(not (slow > 1.5 * usual and fastest["aminmax(x)"] < slow / 2))
PYTHON
