#!/usr/bin/env bash
# A graph that torch.compile has made reads the conjugate of a signal's imaginary part with the wrong sign.
#
# Versions: torch 2.13.0 on the CPU, the default backend of torch.compile.
# Expected: a compiled function gives what it gives uncompiled, for every tensor that PyTorch hands out.
# Seen: `z.conj().imag` is a view of the memory of z with a bit that says "change the sign when read". Eager PyTorch and
#   the backend "aot_eager" heed it. The default backend reads the memory as it is: relu(x) of such a tensor is
#   relu(-x), without an error or a warning. The same tensor after `resolve_neg()` is right.
# Why it matters: spectra are conjugated and taken apart in front of networks for audio and for radio. Code that hands
#   addresses to kernels of its own has to ask `is_neg()`, as the caller has to call `resolve_neg()` before a compiled model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch

signal = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
lazy = torch.fft.rfft(signal).conj().imag
expected = torch.relu(lazy.resolve_neg())


def function(x):
    return torch.relu(x) * 2 + 1


def right(backend, x):
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend) if backend else function
    return torch.allclose(compiled(x), expected * 2 + 1)


print("the tensor has the bit:", lazy.is_neg())
seen = {
    "eager": right(None, lazy),
    "aot_eager": right("aot_eager", lazy),
    "inductor": right("inductor", lazy),
    "inductor after resolve_neg()": right("inductor", lazy.resolve_neg()),
}
for name, is_right in seen.items():
    print(f"  {name:29} {'right' if is_right else 'WRONG'}")
as_described = lazy.is_neg() and list(seen.values()) == [True, True, False, True]
print("as described" if as_described else "CHANGED: not as described any more")
raise SystemExit(not as_described)
PYTHON
