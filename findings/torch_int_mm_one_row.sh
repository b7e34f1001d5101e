#!/usr/bin/env bash
# torch._int_mm leaves its result unwritten where its input is one row with an unusual stride: a compiled torchao model
# answers one token with whatever the memory held.
#
# Versions: torch 2.13.0, torchao 0.18.0, numpy 2.4.6, on an x86-64 CPU, with a C++ compiler for torch.compile.
# Expected: the stride of a dimension of size 1 means nothing, and a tensor that calls itself contiguous is taken by every
#   operator. int8 products are exact in int32, so a compiled model differs from the eager one by a rounding.
# Seen: the operator hands strides as leading dimensions to oneDNN, which turns the call down where one is less than a row
#   is long, and what it says is not looked at: nothing is written, nothing is raised. One row that was a column (`x.t()`),
#   and weights of a layer with one input, do it in eager mode; `.contiguous()` does not help, as they are contiguous, and a
#   copy into a new tensor does. torch.compile gives such a stride, 0, to one token of [1, 1, K]: with
#   Int8DynamicActivationInt8WeightConfig its answer is off by millions, while [1, K], [2, 1, K] and [1, 3, K] are right.
#   PyTorch's issue 195066, open in 2026-08, is about the stride of 0; the other two are the same omission.
# Why it matters: decoding one token after another is this shape and no other. A check with a batch, a prompt or the eager
#   model passes. Whoever exports programs that call the operator has to see to the strides of a single row.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 torchao==0.18.0 numpy==2.4.6
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore - <<'PYTHON' 2> >(grep -v -e 'Failed to load' -e register_constant >&2)
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

torch.manual_seed(0)
as_described = True


def holds(condition):
    global as_described
    as_described = as_described and bool(condition)


def integers(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def outcome(a, b):
    """What becomes of a result that was all -1."""
    out = torch.full((a.shape[0], b.shape[1]), -1, dtype=torch.int32)
    torch._int_mm(a, b, out=out)
    if torch.equal(out.long(), a.long() @ b.long()):
        return "exact"
    return "unwritten" if bool((out == -1).all()) else "wrong"


weight = integers(64, 96)
column = integers(96, 1)
one_input = integers(64, 1)
cases = {
    "one row": (integers(1, 96), weight.t(), "exact"),
    "one row that was a column": (column.t(), weight.t(), "unwritten"),
    "the same, .contiguous()": (column.t().contiguous(), weight.t(), "unwritten"),
    "the same, copied": (torch.empty(1, 96, dtype=torch.int8).copy_(column.t()), weight.t(), "exact"),
    "the same, two rows": (torch.cat([column, column], 1).t(), weight.t(), "exact"),
    "5 rows, weight of one input": (integers(5, 1), one_input.t(), "unwritten"),
    "5 rows, the same numbers [1, 64]": (integers(5, 1), one_input.reshape(1, 64), "exact"),
}
for name, (a, b, expected) in cases.items():
    found = outcome(a, b)
    print(f"  {name:33} strides {a.stride()} {b.stride()}, contiguous {a.is_contiguous()}: {found}")
    holds(found == expected)
with torch.backends.mkldnn.flags(enabled=False):
    found = outcome(column.t(), weight.t())
print(f"  one row that was a column, without oneDNN: {found}")
holds(found == "exact")

for shape in ((1, 512), (2, 1, 512), (1, 3, 512), (1, 1, 512)):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512)).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        exact = model(x)
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        eager, compiled = ((run(x) - exact).norm() / exact.norm() for run in (model, torch.compile(model)))
    print(f"  torchao int8, input {shape!s:12} relative error: eager {eager:.3f}, compiled {compiled:.3g}")
    holds(eager < 0.05 and (not compiled < 0.5 if shape == (1, 1, 512) else compiled < 0.05))
print("as described" if as_described else "CHANGED: not as described any more")
raise SystemExit(not as_described)
PYTHON
