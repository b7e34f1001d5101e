#!/usr/bin/env bash
# A bfloat16 convolution of an odd number of channels makes NaN of pixels whose window holds no NaN.
#
# Versions: torch 2.13.0 (oneDNN inside) on an x86-64 processor with bfloat16 instructions (AVX512-BF16). Without them
#   nothing can be seen, and the script says so.
# Expected: a pixel of the result depends on the pixels in its window and on no other. float32 keeps that.
# Seen: with 3 channels in channels_last, as an RGB image has, one NaN makes NaN of its 3 x 3 pixels and of 3 beside them; an
#   infinity does it too, and 1 x 1 convolutions do. The instruction multiplies pairs of channels: the partner of the last
#   odd one is, one would say, the next pixel's first channel, times a weight of 0, which is NaN for what is not finite.
#   Contiguous images do it with some sizes and not with others. An even number of channels is exact, and no other image of
#   the batch is reached.
# Why it matters: masks made with NaN or infinities (no-data pixels of maps and depth cameras) grow by a pixel in the first
#   layer, in bfloat16 and on such processors only; a test that compares where NaN are between two dtypes or layouts fails.
#   What is not finite has to be counted per image, not per pixel.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.nn import functional as F

if not torch.cpu._is_avx512_bf16_supported():
    print("this processor has no bfloat16 instructions: nothing to see")
    raise SystemExit(0)


def reached(channels, kernel, dtype, value):
    """Pixels of the result that are not finite: (as the windows say, as computed, in the other image)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 16, 16, generator=generator)
    weight = torch.randn(1, channels, kernel, kernel, generator=generator)
    x[1, 0, 5, 5] = value
    exact = F.conv2d(x.double(), weight.double())
    computed = F.conv2d(x.to(dtype).to(memory_format=torch.channels_last), weight.to(dtype))
    return [int((~each).sum()) for each in (exact.isfinite(), computed[1].isfinite(), computed[0].isfinite())]


as_described = True
for channels in (3, 4):
    for kernel in (1, 3):
        for dtype in (torch.float32, torch.bfloat16):
            for value in (float("nan"), float("inf")):
                exact, computed, other = reached(channels, kernel, dtype, value)
                spreads = channels == 3 and dtype == torch.bfloat16
                as_described = as_described and other == 0 and (computed > exact if spreads else computed == exact)
                mark = " <--" if computed != exact else ""
                print(f"  {channels} channels, kernel {kernel}, {dtype}, one {value}: {computed} pixels, of {exact}{mark}")
print("as described" if as_described else "CHANGED: not as described any more")
raise SystemExit(not as_described)
PYTHON
