"""What linear layers and convolutions with 2:4 weights share: the places of what is kept, and that they are checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tilewright.kernels.formats import sparse24


class Sparse24Places(nn.Module):
    """A buffer ``weight_meta``, as ``kernels.formats.sparse24`` defines it. To be inherited from first."""

    weight_meta: torch.Tensor

    def _columns(self) -> int:
        """Columns of the dense matrix that the weight stands for."""
        raise NotImplementedError(f"{type(self).__name__}._columns")

    def why_bad_buffer(self, name: str, value: torch.Tensor) -> str | None:
        """Why ``value`` cannot be the buffer called ``name``, or None: places must ascend, or values would be lost and
        matrix instructions undefined.
        """
        if name != "weight_meta" or value.is_meta or value.shape != self.weight_meta.shape:
            return None
        return sparse24.why_bad_meta(value, self._columns())

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        error_msgs: list[str] = rest[-1]
        meta = state_dict.get(prefix + "weight_meta")
        if meta is not None and meta.dtype == torch.uint8 and (reason := self.why_bad_buffer("weight_meta", meta)):
            error_msgs.append(f"{prefix}weight_meta is no 2:4 pattern: {reason}")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)
