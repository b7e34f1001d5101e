#!/usr/bin/env bash
# With Inductor's freezing, a ReLU behind a convolution or a linear layer turns NaN into 0 on a CPU.
#
# Versions: torch 2.13.0 on the CPU (x86-64), torch.compile with freezing, float32 and bfloat16.
# Expected: relu(NaN) is NaN, as in eager PyTorch and in torch.compile without freezing: a sample that went wrong shows.
# Seen: freezing joins a convolution and the ReLU or ReLU6 behind it into one operator of oneDNN, whose ReLU compares with
#   0 and gives 0 for NaN. A NaN pixel comes out as an ordinary feature. Hardswish and SiLU joined in the same way keep
#   NaN. The joined operator does it when it is called directly too, and so does the one for linear layers.
# Why it matters: "the output is finite" is a usual check on a running model, and comparing a compiled model with the eager
#   one on bad inputs a usual test. Both say something else as soon as freezing is on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch._inductor.config
from torch import nn

torch.manual_seed(0)
images = torch.randn(2, 3, 16, 16)
images[1, 0, 5, 5] = float("nan")


def kept(activation, dtype, freezing):
    """Whether the compiled network has NaN for the image for which the eager one has."""
    torch._dynamo.reset()
    torch._inductor.config.freezing = freezing
    model = nn.Sequential(nn.Conv2d(3, 8, 3), activation).to(dtype).eval()
    x = images.to(dtype)
    with torch.no_grad():
        results = torch.compile(model)(x), model(x)
    return [y.isnan().flatten(1).any(1).tolist() for y in results] == [[False, True], [False, True]]


def direct():
    """Whether the joined operators keep NaN where they are called by name."""
    rows, weight = torch.full((2, 8), float("nan")), torch.randn(4, 8)
    joined = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "relu", [], "")
    return bool(joined.isnan().all())


seen = {
    (name, dtype, freezing): kept(activation, dtype, freezing)
    for name, activation in {"ReLU": nn.ReLU(), "ReLU6": nn.ReLU6(), "Hardswish": nn.Hardswish(), "SiLU": nn.SiLU()}.items()
    for dtype in (torch.float32, torch.bfloat16)
    for freezing in (False, True)
}
for (name, dtype, freezing), is_kept in seen.items():
    print(f"  {name:10} {str(dtype):15} freezing {'on ' if freezing else 'off'}: NaN {'stays' if is_kept else 'is LOST'}")
linear = direct()
print("  linear with ReLU, called directly: NaN", "stays" if linear else "is LOST")
lost = {key for key, is_kept in seen.items() if not is_kept}
as_described = not linear and lost == {
    (name, dtype, True) for name in ("ReLU", "ReLU6") for dtype in (torch.float32, torch.bfloat16)
}
print("as described" if as_described else "CHANGED: not as described any more")
raise SystemExit(not as_described)
PYTHON
