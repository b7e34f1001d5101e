#!/usr/bin/env bash
# PyTorch's fused optimizers write to parameters without counting the write.
#
# Versions: torch 2.13.0, CPU.
# Expected: every operator that writes to a tensor in place raises its version counter, `tensor._version`. The schema of
#   `_fused_sgd_` says that it writes (`Tensor(a!)[] self`), and the plain and the foreach optimizer do raise the counter.
# Seen: SGD, Adam, AdamW and Adagrad with `fused=True` change the parameter and leave its version as it was. So autograd
#   does not notice that a tensor which it saved for the backward pass was overwritten: it returns a gradient that is
#   wrong, where the same step with `foreach=True` raises an error. `torch.autograd.graph.increment_version` makes up
#   for it.
# Why it matters: whatever is computed from a weight once and kept as long as the weight's version stays the same, such
#   as a folded or repacked weight, is kept too long after a fused step. Nothing else changes that one could see: the
#   object, its memory and its strides are the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

as_described = True


def holds(condition):
    global as_described
    as_described = as_described and bool(condition)


optimizers = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
for way in ("foreach", "fused"):
    for optimizer in optimizers:
        weight = torch.nn.Parameter(torch.ones(8))
        weight.grad = torch.ones(8)
        before, version = weight.detach().clone(), weight._version
        optimizer([weight], lr=0.1, **{way: True}).step()
        changed, counted = not torch.equal(weight, before), weight._version - version
        print(f"{optimizer.__name__:8} {way}=True: changed {changed}, writes counted {counted}")
        holds(changed and (counted == 0) == (way == "fused"))


def backward_after_a_step(count_it, **way):
    """d(x * w)/dx for w = 2, with a step that makes w = 1 between forward and backward."""
    weight, x = torch.nn.Parameter(torch.tensor([2.0])), torch.ones(1, requires_grad=True)
    y = (x * weight).sum()
    weight.grad = torch.ones(1)
    torch.optim.SGD([weight], lr=1.0, **way).step()
    if count_it:
        torch.autograd.graph.increment_version(weight)
    try:
        y.backward()
    except RuntimeError:
        return "an error"
    return x.grad.item()


found = [
    backward_after_a_step(False, foreach=True),
    backward_after_a_step(False, fused=True),
    backward_after_a_step(True, fused=True),
]
print("gradient, 2 if it is right: foreach", found[0], "| fused", found[1], "| fused, then counted by hand", found[2])
holds(found == ["an error", 1.0, "an error"])
print("as described" if as_described else "CHANGED: not as described any more")
raise SystemExit(not as_described)
PYTHON
