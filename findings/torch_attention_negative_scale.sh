#!/usr/bin/env bash
# On a CPU, attention with is_causal=True and a scale of 0 or less gives NaN, or the zeros of a row that sees nothing.
#
# Versions: torch 2.13.0, numpy 2.4.6, CPU.
# Expected: `scale` is a factor of the scores, and the documentation of F.scaled_dot_product_attention masks after it. So a
#   scale of -s is a scale of s for -q, and with a scale of 0 each place has the mean of the values up to it.
# Seen: the flash kernel, which a CPU takes by itself, writes minus infinity over the scores beyond the diagonal first and
#   multiplies by `scale` then: plus infinity, or NaN for 0. In float32 every row with something to hide is NaN. In bfloat16
#   with hundreds of keys a negative scale makes most of them 0, which no check for NaN finds. What is right is one row in
#   each block of queries, the last. The same mask as a tensor, the factor moved into q, and the math backend are right.
# Why it matters: a sign or a factor in front of the product (scores that are negative distances, a learned temperature that
#   starts at 0) is what a converter folds into `scale`, and a mask that is a triangle is what it replaces by is_causal. Each
#   of the two steps alone is exact, and so is an encoder's attention, which hides nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.manual_seed(0)


def rows(found, exact):
    """Shares of all rows: (right, NaN, zero)."""
    right = (found.double() - exact).norm(dim=-1) < 0.02 * exact.norm(dim=-1)
    return [round(float(each.double().mean()), 3) for each in (right, found.isnan().any(-1), (found == 0).all(-1))]


def ways(dtype, tokens, scale):
    """Shares of rows by the way in which the same attention is asked for."""
    q, k, v = torch.randn(3, 1, 2, tokens, 64).to(dtype)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    scores = (q.double() @ k.double().mT * scale).masked_fill(~mask, float("-inf"))
    exact = scores.softmax(-1) @ v.double()
    found = {
        "is_causal=True": F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale),
        "mask": F.scaled_dot_product_attention(q, k, v, mask, scale=scale),
        "factor in q": F.scaled_dot_product_attention(q * scale, k, v, is_causal=True, scale=1.0),
    }
    with sdpa_kernel(SDPBackend.MATH):
        found["math backend"] = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return {way: rows(y, exact) for way, y in found.items()}


as_described = True
for dtype, tokens in ((torch.float32, 8), (torch.float32, 2000), (torch.bfloat16, 8), (torch.bfloat16, 2000)):
    for scale in (0.125, -0.125, 0.0):
        found = ways(dtype, tokens, scale)
        right, nan, zero = found.pop("is_causal=True")
        others = min(each[0] for each in found.values())
        print(
            f"  {dtype}, {tokens:4} tokens, scale {scale:6}: is_causal {right:.3f} of the rows right, {nan:.3f} NaN, "
            f"{zero:.3f} zero; other ways {others:.3f} right"
        )
        as_described = as_described and others > 0.99
        if scale > 0:
            as_described = as_described and right > 0.99
        elif dtype == torch.bfloat16 and tokens == 2000 and scale < 0:
            as_described = as_described and zero > 0.9
        else:
            as_described = as_described and right < 0.2 and nan > 0.8
print("as described" if as_described else "CHANGED: not as described any more")
raise SystemExit(not as_described)
PYTHON
