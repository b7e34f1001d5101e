"""A cache of keys and values in int8, for transformers' decoders: a quarter of the memory, and what a step reads of it.

Imported when somebody asks for it, since it needs transformers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from transformers import cache_utils

#: Positions that are made room for at least, and the part of those that there are.
_LEAST, _PART = 64, 4
#: Errors of so many positions are kept one by one before they are added up.
_PENDING = 64


class CacheError(NamedTuple):
    """Signal to noise in dB, 10 log10(sum x^2 / sum (x - what the codes give)^2), of what was written to a cache; inf
    where nothing was lost.
    """

    keys: float
    values: float


class CodedRoom(NamedTuple):
    """What an int8 layer holds and has room for: codes [batch, heads, length, width], float32 scales [batch, heads,
    length], the first position that is to be written, and where their errors belong, [4, batch * heads, positions].
    """

    keys: torch.Tensor
    values: torch.Tensor
    first: int
    key_scales: torch.Tensor
    value_scales: torch.Tensor
    errors: torch.Tensor

    def write(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what it was made for; gives all that it holds, in float32."""
        wholes = ((self.keys, self.key_scales, key), (self.values, self.value_scales, value))
        for number, (codes, scales, new) in enumerate(wholes):
            made, scale = quantized(new)
            codes[:, :, self.first :], scales[:, :, self.first :] = made, scale
            exact = new.double()
            lost = exact - (made * scale[..., None]).double()
            for kind, sums in enumerate((exact, lost)):
                self.errors[2 * number + kind] = sums.square().sum(-1).flatten(0, 1)
        keys, values = (codes * scales[..., None] for codes, scales, _ in wholes)
        return keys, values


class Int8Layer(cache_utils.CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """Codes, each worth code * scale, and a float32 scale for each token and head, of keys and of values."""

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        self.is_initialized = False
        self._clear()

    def _clear(self) -> None:
        self.first = self.length = self.pending = 0
        # In tuples, where nobody takes them for results of a call: beyond what there is they hold anything.
        self._codes: tuple[torch.Tensor, ...] = ()
        self._errors: tuple[torch.Tensor, ...] = ()
        self._sums = (torch.zeros(4, dtype=torch.float64),)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Room for what is like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        (batch, heads), device = key_states.shape[:2], self.device
        widths = key_states.shape[3], value_states.shape[3]
        codes = [torch.empty(batch, heads, 0, width, dtype=torch.int8, device=device) for width in widths]
        self._codes = (*codes, *(torch.empty(batch, heads, 0, device=device) for _ in range(2)))
        self.is_initialized = True

    # ---- writing
    def room(self, count: int) -> CodedRoom:
        """Room for ``count`` positions more, which are counted as there; whoever asks writes them and their errors."""
        self._make_room(count)
        end = self.first + self.length
        keys, values, key_scales, value_scales = (whole[:, :, self.first : end + count] for whole in self._codes)
        errors = self._count_errors(count)[:, :, self.pending : self.pending + count]
        self.pending += count
        found = CodedRoom(keys, values, self.length, key_scales, value_scales, errors)
        self.length += count
        self._keep()
        return found

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take keys and values [batch, heads, length, width]; give those of all positions, made numbers again. Raises
        RuntimeError where a gradient would be lost.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError("Int8Cache has no gradient: call the model under torch.no_grad()")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.room(key_states.shape[2]).write(key_states, value_states)
        return keys.to(self.dtype), values.to(self.dtype)

    def _make_room(self, count: int) -> None:
        end = self.first + self.length
        fits = end + count <= self._codes[0].shape[2]
        if fits and (torch.is_inference_mode_enabled() or not any(whole.is_inference() for whole in self._codes)):
            return
        size, grown = self.length + count, []
        for whole in self._codes:
            made = whole.new_empty(*whole.shape[:2], size + max(_LEAST, size // _PART), *whole.shape[3:])
            made[:, :, : self.length] = whole[:, :, self.first : end]
            grown.append(made)
        self._codes, self.first = tuple(grown), 0

    def _count_errors(self, count: int) -> torch.Tensor:
        """Room for the errors of ``count`` positions behind those pending, which are added up if need be."""
        batch, heads = self._codes[0].shape[:2]
        for errors in self._errors:
            fits = errors.shape[1] == batch * heads and self.pending + count <= errors.shape[2]
            if fits and (torch.is_inference_mode_enabled() or not errors.is_inference()):
                return errors
        self._sums, self.pending = (self._written(),), 0
        errors = torch.empty(4, batch * heads, max(_PENDING, count), device=self.device)
        self._errors = (errors,)
        return errors

    def _written(self) -> torch.Tensor:
        pending = [errors[:, :, : self.pending].double().sum((1, 2)).cpu() for errors in self._errors]
        return sum(pending, self._sums[0])

    def _keep(self) -> None:
        """Let go of what later positions do not see."""

    # ---- what it holds
    @property
    def keys(self) -> torch.Tensor | None:
        """All keys, made numbers again, or None."""
        return self._numbers(0)

    @property
    def values(self) -> torch.Tensor | None:
        """All values, made numbers again, or None."""
        return self._numbers(1)

    def _numbers(self, which: int) -> torch.Tensor | None:
        if not self.is_initialized:
            return None
        codes, scales = (self._codes[i][:, :, self.first : self.first + self.length] for i in (which, which + 2))
        return (codes * scales[..., None]).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales of the positions that it holds."""
        rooms = max(self._codes[0].shape[2], 1) if self._codes else 1
        return sum(whole.nbytes * self.length // rooms for whole in self._codes)

    @property
    def error(self) -> CacheError:
        """Of all that was written since it began or was reset."""
        return _error(self._written())

    def get_seq_length(self) -> int:
        """Positions that it has taken and not lost."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many positions a mask has with ``query_length`` new ones, and the number of the first."""
        return self.length + query_length, 0

    # ---- changes
    def reset(self) -> None:
        """Forget everything, the error too."""
        self._clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions. Raises ValueError where that is positive."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes how many positions to remove as a negative number, not {tokens_to_remove}")
        self.length = max(self.length + tokens_to_remove, 0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """The sequences ``beam_idx`` [batch] in place of what there is."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times."""
        self._change(lambda whole: whole.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """The sequences ``indices`` alone."""
        self._change(lambda whole: whole[indices.to(whole.device)])

    def _change(self, of_batch: Any) -> None:
        self._codes = tuple(map(of_batch, self._codes))

    def offload(self) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError("Int8Cache is not offloaded")

    def prefetch(self) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError("Int8Cache is not offloaded")

    def __copy__(self) -> Int8Layer:
        """With memory of its own, since both are written to."""
        made = type(self).__new__(type(self))
        made.__dict__.update(vars(self), _codes=tuple(whole.clone() for whole in self._codes))
        made._errors = tuple(errors.clone() for errors in self._errors)
        return made


class Int8SlidingLayer(Int8Layer):
    """The same of the last ``sliding_window - 1`` positions."""

    is_sliding = True
    is_croppable = False

    def __init__(self, sliding_window: int) -> None:
        self.sliding_window, self.cumulative_length = sliding_window, 0
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self.cumulative_length = 0

    def room(self, count: int) -> CodedRoom:
        """As of other layers; what leaves the window is still in it."""
        self.cumulative_length += count
        return super().room(count)

    def _keep(self) -> None:
        gone = max(self.length - (self.sliding_window - 1), 0)
        self.first, self.length = self.first + gone, self.length - gone

    def get_seq_length(self) -> int:
        """Positions that it has taken, those included that have left the window."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of other layers."""
        offset = max(self.cumulative_length - self.sliding_window + 1, 0)
        return min(self.cumulative_length, self.sliding_window - 1) + query_length, offset

    def crop(self, tokens_to_remove: int) -> None:
        """As of other layers. Raises RuntimeError where positions would have to come back that have left the window."""
        if tokens_to_remove < 0 and self.cumulative_length >= self.sliding_window:
            raise RuntimeError("an int8 layer with a sliding window keeps nothing from before it, so it cannot crop")
        super().crop(tokens_to_remove)
        self.cumulative_length = self.length


class Int8Cache(cache_utils.Cache):  # type: ignore[misc]
    """A cache of int8 codes for the ``past_key_values`` of transformers' decoders, in ``generate`` or ``forward``.

    config: that of the model, where its layers have sliding windows; without one, all of them keep everything. Keys and
    values have a float32 scale for each token and head: of heads 64 wide it takes 0.27 of the bytes of float32. Steps
    of up to four tokens of a converted decoder on a CPU read the codes; whoever else asks gets numbers made of them.
    ``error`` has what the codes lose, measured as they are written; so have ``print(cache)`` and ``tilewright.report``
    (``cache=``).

    Raises ValueError for a model whose layers keep something else than keys and values. What is not finite makes the
    whole token of its head NaN. There is no gradient.
    """

    def __init__(self, config: Any = None) -> None:
        if config is None:
            super().__init__(layer_class_to_replicate=Int8Layer)
            return
        layers: list[Any] = []
        for number, layer in enumerate(cache_utils.DynamicCache(config=config).layers):
            if type(layer) is cache_utils.DynamicLayer:
                layers.append(Int8Layer())
            elif type(layer) is cache_utils.DynamicSlidingWindowLayer:
                layers.append(Int8SlidingLayer(layer.sliding_window))
            else:
                raise ValueError(
                    f"Int8Cache has no layer in place of {type(layer).__name__}, layer {number} of the model"
                )
        super().__init__(layers=layers)

    @property
    def error(self) -> CacheError:
        """Of all layers together."""
        return _error(sum((layer._written() for layer in self.layers), torch.zeros(4, dtype=torch.float64)))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales of all positions that it holds."""
        return sum(layer.nbytes for layer in self.layers)

    def __repr__(self) -> str:
        length = self.get_seq_length() if self.layers else 0
        keys, values = self.error
        size = f"{len(self.layers)} layers, {length} positions, {self.nbytes} bytes"
        return f"Int8Cache({size}, signal to noise of keys {keys:.1f} dB, of values {values:.1f} dB)"


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of x [..., width] and scales [...]: what attention_few.c makes of it, to the bit."""
    x = x.float()
    scale = x.abs().amax(-1) / 127
    scale = torch.where(x.isfinite().all(-1), scale, math.nan)
    positive = (scale > 0)[..., None]
    codes = torch.where(positive, torch.round(x / scale[..., None]), 0.0)
    return codes.clamp(-127, 127).to(torch.int8), scale


def _error(sums: torch.Tensor) -> CacheError:
    keys, key_errors, values, value_errors = sums.tolist()
    return CacheError(*(_decibels(a, b) for a, b in ((keys, key_errors), (values, value_errors))))


def _decibels(signal: float, noise: float) -> float:
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    return 10 * math.log10(signal / noise) if signal and noise else math.inf
