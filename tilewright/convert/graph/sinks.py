"""The attention with sinks of transformers' gpt-oss and its like: whether it is ours.

PyTorch's attention has no sinks, so such models have one of their own in Python, which they call "eager". It is taken
for that of ``kernels.attention`` if the function gives the same for a few numbers.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tilewright.kernels.attention import reference

#: What a config calls it.
EAGER = "eager"


def eager_attention(module: nn.Module) -> Callable[..., Any] | None:
    """The function that a module with ``sinks`` calls where its config says "eager"; None where there is none."""
    if not isinstance(getattr(module, "sinks", None), torch.Tensor):
        return None
    return getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)


def has_our_sinks(module: nn.Module) -> bool:
    """Whether the "eager" attention of ``module`` is ours with ``module.sinks``."""
    function = eager_attention(module)
    return function is not None and getattr(module.sinks, "ndim", 0) == 1 and _is_ours(function)


@functools.lru_cache(maxsize=64)
def _is_ours(function: Callable[..., Any]) -> bool:
    def some(*shape: int) -> torch.Tensor:
        return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).mul(1.7).sin().view(shape)

    query, key, value, mask = some(2, 4, 3, 8), some(2, 2, 5, 8) + 0.5, some(2, 2, 5, 8), some(2, 1, 3, 5)
    module: Any = types.SimpleNamespace(sinks=some(4), num_key_value_groups=2, training=False)
    with torch.no_grad():
        for seen in (mask, None):
            expected = reference.attention(query, key, value, seen, scale=0.3, sinks=module.sinks)
            try:
                found = function(module, query, key, value, seen, scaling=0.3, dropout=0.0, s_aux=module.sinks)[0]
            except Exception:  # a function of another kind
                return False
            if found.shape != expected.transpose(1, 2).shape or not torch.allclose(found, expected.transpose(1, 2)):
                return False
    return True
