"""What linear layers and convolutions with 2:4 weights share: the places of what is kept, and that they are checked."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from tilewright.kernels.formats import sparse24
from tilewright.nn.weight_holder import WeightHolder


class Sparse24Places(WeightHolder):
    """A buffer ``weight_meta``, as ``kernels.formats.sparse24`` defines it. To be inherited from first."""

    weight_meta: torch.Tensor

    def why_bad_buffer(self, name: str, value: torch.Tensor) -> str | None:
        """Why ``value`` cannot be the buffer called ``name``, or None: places must ascend, or values would be lost and
        matrix instructions undefined.
        """
        if name != "weight_meta" or value.is_meta or value.shape != self.weight_meta.shape:
            return None
        return sparse24.why_bad_meta(value, self._columns())

    def _check_rows(self, rows: torch.Tensor) -> None:
        if rows.isfinite().all() and sparse24.why_not_24(rows):
            warnings.warn(
                f"the weight written into {self._label()} is not 2:4, and the layer keeps the larger two of every four "
                "values: prune it first, or give the plain layer back with tw.revert_model",
                stacklevel=2,
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        error_msgs: list[str] = rest[-1]
        meta = state_dict.get(prefix + "weight_meta")
        if meta is not None and meta.dtype == torch.uint8 and (reason := self.why_bad_buffer("weight_meta", meta)):
            error_msgs.append(f"{prefix}weight_meta is no 2:4 pattern: {reason}")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)
