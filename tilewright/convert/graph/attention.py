"""Attention of converted transformers: the C kernel for short sequences instead of PyTorch's.

Once its linear layers are int8, a sentence encoder on a CPU spends a third of its time in PyTorch's attention, whose
arithmetic is a fiftieth of the whole. The models of transformers look their attention up by a name in their config. So
the attention modules of a converted model see their config through an ``AttentionConfig``, which shows "sdpa" as the
name of a function that calls ``kernels.attention.call``, which computes the same, within float32 rounding. Models with
sinks have no "sdpa": what their config calls "eager" is shown so, where it is the same (``sinks``). Everything
else keeps the attention it has: another choice of the user, also a later one, a model whose code asks whether the name
is "sdpa", a GPU, training.

The config itself, which other models may share and new ones be made from, is not written to. All that transformers as a
whole gets is one more name in its tables of attention and mask functions, which no model uses that was not converted.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tilewright.convert.graph.sinks import EAGER, eager_attention, has_our_sinks
from tilewright.kernels.attention import call
from tilewright.kernels.cpu.recording import reads_held

NAME = "tilewright"
#: What it stands in for.
REPLACED = "sdpa"
#: What the function that it stands in for may be asked to do.
_KNOWN = {
    *("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal"),
    *("position_bias", "cache", "softcap", "kwargs"),
}


class AttentionConfig:
    """The config of an attention module, whatever it is at the moment, but that our attention stands for PyTorch's.

    Whoever asks takes it for ``config``: attributes are read there and written there.
    """

    config: Any
    replaced: str

    def __init__(self, config: Any, replaced: str = REPLACED):
        vars(self).update(config=config, replaced=replaced)

    @property
    def _attn_implementation(self) -> Any:
        name = self.config._attn_implementation
        return NAME if name == self.replaced else name

    @property  # type: ignore[misc]  # proxies do so, for isinstance
    def __class__(self) -> Any:
        return type(self.config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # A model that is made of this config writes back what it has read.
        setattr(self.config, name, self.replaced if isinstance(value, str) and value == NAME else value)

    def __delattr__(self, name: str) -> None:
        delattr(self.config, name)

    def __eq__(self, other: object) -> bool:
        return bool(self.config == (other.config if type(other) is AttentionConfig else other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self.config)

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any, ...]]:
        return _seen, (self.config, self.replaced)


def behind(value: Any) -> Any:
    """The config itself, of an ``AttentionConfig``; any other value as it is."""
    return vars(value)["config"] if type(value) is AttentionConfig else value


def _seen(config: Any, replaced: str = REPLACED) -> Any:
    """``config`` as attention modules see it, also in a process that has read it from a file and converted nothing;
    itself in a version of transformers that cannot be told of other attentions.
    """
    return AttentionConfig(config, replaced) if _register() else config


def _register() -> bool:
    """Make the name known to transformers, if that is imported and has a place for it."""
    utils, masks = (sys.modules.get(f"transformers.{name}") for name in ("modeling_utils", "masking_utils"))
    functions = getattr(utils, "ALL_ATTENTION_FUNCTIONS", None)
    mask_functions = getattr(masks, "ALL_MASK_ATTENTION_FUNCTIONS", None)
    if functions is None or mask_functions is None or not hasattr(functions, "register"):
        return False
    if REPLACED not in functions or REPLACED not in mask_functions:
        return False
    if not set(inspect.signature(functions[REPLACED]).parameters) <= _KNOWN:
        return False  # a version that does more than this file knows of
    if NAME not in functions:
        functions.register(NAME, attention_forward)
        mask_functions.register(NAME, mask_functions[REPLACED])
    return True


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [batch, heads, length, width], key and value likewise -> ([batch, length, heads, width], None): what
    transformers calls. Whatever our attention does not take goes to the function that it stands in for.
    """
    tracer = getattr(query, "tracer", None)
    if tracer is not None:  # of a graph, which shows it as one call
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        given = (module, query, key, value, attention_mask)
        return tracer.create_proxy("call_function", attention_output, given, options), None

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    if _is_eager(module):
        sinks = kwargs.get("s_aux")
        if not _wants_more(module, dropout, kwargs) and call.supports(query, key, value, attention_mask, False, sinks):
            y = call.attention(query, key, value, attention_mask, False, scaling, sinks)
            return y.transpose(1, 2).contiguous(), None
        theirs: Any = eager_attention(module)
        return theirs(module, query, key, value, attention_mask, **options)
    length, causal = query.shape[2], is_causal
    if causal is None:
        causal = getattr(module, "is_causal", True)
    causal = bool(causal) and attention_mask is None and length > 1
    if _special(kwargs) or dropout or (causal and key.shape[2] != length):
        supports = False
    else:
        supports = call.supports(query, key, value, attention_mask, causal)
    if supports:
        y = call.attention(query, key, value, attention_mask, causal, scaling)
        return y.transpose(1, 2).contiguous(), None
    return ALL_ATTENTION_FUNCTIONS[REPLACED](module, query, key, value, attention_mask, **options)


def _as_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Any, ...] | None:
    """Query, key, value, mask, scale and sinks of the attention that ``attention_forward`` asks for, however many keys
    there are; None where it may ask for another.
    """
    if _is_eager(module):
        more = _wants_more(module, dropout, kwargs)
        return None if more else (query, key, value, attention_mask, scaling, kwargs["s_aux"])
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if dropout or _special(kwargs) or (causal and attention_mask is None and query.shape[2] > 1):
        return None
    return query, key, value, attention_mask, scaling, None


def _is_eager(module: nn.Module) -> bool:
    config = vars(module).get("config")
    return type(config) is AttentionConfig and config.replaced == EAGER


def _wants_more(module: nn.Module, dropout: float, options: dict[str, Any]) -> bool:
    """Whether ``eager_attention`` is asked for more than ours gives. A hook may read the weights that it returns."""
    return bool(dropout) or _special(options) or bool(module._forward_hooks) or options.get("s_aux") is None


def _special(options: dict[str, Any]) -> bool:
    """Whether more than attention is asked for."""
    named = any(options.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    return named or bool(options.get("output_attentions"))


@reads_held(_as_attention)
def attention_output(*args: Any, **kwargs: Any) -> torch.Tensor:
    """What ``attention_forward`` computes, without the weights, which it does not give."""
    return attention_forward(*args, **kwargs)[0]


def use(model: nn.Module) -> list[str]:
    """Have the attention of ``model`` computed by ours where it may be; returns the names of its attention modules."""
    if not _register():
        return []
    asks = functools.cache(_asks_for_the_name)
    seen: dict[tuple[int, str], AttentionConfig] = {}
    names = []
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if "Attention" not in type(module).__name__ or config is None:
            continue
        replaced = config.replaced if type(config) is AttentionConfig else EAGER if has_our_sinks(module) else REPLACED
        if getattr(config, "_attn_implementation", None) not in (replaced, NAME):
            continue
        if any(asks(kind.__module__, replaced) for kind in type(module).__mro__ if issubclass(kind, nn.Module)):
            continue
        if type(config) is not AttentionConfig:
            vars(module)["config"] = seen.setdefault((id(config), replaced), AttentionConfig(config, replaced))
        names.append(name)
    return names


def restore(model: nn.Module) -> None:
    """Undo ``use``."""
    for module in model.modules():
        config = vars(module).get("config")
        if type(config) is AttentionConfig:
            vars(module)["config"] = vars(config)["config"]


def _asks_for_the_name(module: str, name: str) -> bool:
    """Whether the source of the Python module has the name in it: then the code may do something else for others."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return True
    return f'"{name}"' in source or f"'{name}'" in source
