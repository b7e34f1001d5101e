"""The drop-in linear layers: for each what it calls, how its weight is stored, and the options it has."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tilewright.kernels.formats import sparse24
from tilewright.kernels.formats.int4 import Int4
from tilewright.kernels.formats.int8 import Int8
from tilewright.kernels.formats.sparse24 import Sparse24
from tilewright.kernels.formats.weight import Float
from tilewright.nn.quantized_linear import QuantizedLinear
from tilewright.nn.sparse24_places import Sparse24Places

#: Options of layers with int4 weights.
_INT4: dict[str, Any] = {"group_size": 128, "symmetric": False, "scale_dtype": None}
#: Options of weight-only layers.
_FLOAT_PRODUCTS: dict[str, Any] = {"compute_dtype": None, "keep_dequantized": False}
#: What ``from_float`` of layers with 2:4 weights is told of a pruning that was made before.
_PRUNED: dict[str, Any] = {"mask": None, "weight": None}


class Int8Linear(QuantizedLinear):
    """int8 weights and activations (W8A8), activations quantised on the fly, one scale a row; see
    ``kernels.int8_linear``.

    ``weight_codes`` int8 [out_features, in_features], ``weight_scale`` float32 [out_features].
    """

    scheme_name = "w8a8"
    op_name = "int8_linear"
    base_format = Int8()
    options: ClassVar[dict[str, Any]] = {"channel_scale": False}
    from_float_options: ClassVar[dict[str, Any]] = {"range_search": "minmax", "channel_scale": None}


class Int8WeightOnlyLinear(QuantizedLinear):
    """int8 weights, float activations (W8A16); see ``kernels.int8_weight_only_linear``.

    The weight is that of ``Int8Linear``. ``compute_dtype`` None: nothing is rounded.
    """

    scheme_name = "w8a16"
    op_name = "int8_weight_only_linear"
    base_format = Int8()
    options: ClassVar[dict[str, Any]] = _FLOAT_PRODUCTS
    from_float_options: ClassVar[dict[str, Any]] = {
        "range_search": "minmax",
        "importance": None,
        "compute_dtype": "auto",
    }


class Int4Linear(QuantizedLinear):
    """int4 weights, float activations (W4A16); see ``kernels.int4_linear``.

    ``weight_packed``, ``weight_scale`` and, if asymmetric, ``weight_zero``: see ``kernels.formats.int4``. group_size:
    columns that share a scale; None or -1: the whole row. scale_dtype: by default the layer's dtype if it has 16 bits,
    else bfloat16.
    """

    scheme_name = "w4a16"
    op_name = "int4_linear"
    base_format = Int4()
    options: ClassVar[dict[str, Any]] = {**_INT4, **_FLOAT_PRODUCTS}
    from_float_options: ClassVar[dict[str, Any]] = {"range_search": "mse", "importance": None, "compute_dtype": "auto"}
    group_size: int
    symmetric: bool


class Int8ActInt4WeightLinear(QuantizedLinear):
    """int4 weights, activations quantised to int8 on the fly (W4A8); see ``kernels.int4_int8_linear``.

    The weight and its options are those of ``Int4Linear``.
    """

    scheme_name = "w4a8"
    op_name = "int4_int8_linear"
    base_format = Int4()
    options: ClassVar[dict[str, Any]] = {**_INT4, "channel_scale": False}
    from_float_options: ClassVar[dict[str, Any]] = {"range_search": "mse", "channel_scale": None}
    group_size: int
    symmetric: bool


class _Sparse24Linear(Sparse24Places, QuantizedLinear):
    """Layers with 2:4 weights: of every four consecutive input columns two are kept.

    ``weight_values`` and ``weight_meta``: see ``kernels.formats.sparse24``. Values keep their dtype under
    ``.to(dtype)``, as scales do: casting there and back loses nothing.
    """

    weight_values: torch.Tensor

    def mask(self) -> torch.Tensor:
        """What is kept, bool [out_features, in_features]."""
        return sparse24.mask_of(self.weight_meta, self.in_features)


class Sparse24Linear(_Sparse24Linear):
    """2:4 weights with float values, float activations; see ``kernels.sparse24_linear``.

    values_dtype: by default the layer's; ``from_float`` makes of "auto" bfloat16 for a float32 layer.
    """

    scheme_name = "sparse24-w16a16"
    op_name = "sparse24_linear"
    base_format = Sparse24(Float())
    options: ClassVar[dict[str, Any]] = {"values_dtype": None, "compute_dtype": None}
    from_float_options: ClassVar[dict[str, Any]] = {**_PRUNED, "values_dtype": "auto", "compute_dtype": "auto"}


class Sparse24Int8Linear(_Sparse24Linear):
    """2:4 weights with int8 values, activations quantised to int8 on the fly, one scale a row."""

    scheme_name = "sparse24-w8a8"
    op_name = "sparse24_int8_linear"
    base_format = Sparse24(Int8())
    options: ClassVar[dict[str, Any]] = {"channel_scale": False}
    from_float_options: ClassVar[dict[str, Any]] = {**_PRUNED, "range_search": "minmax", "channel_scale": None}


class Sparse24Int4Linear(_Sparse24Linear):
    """2:4 weights with int4 values and a scale for each group of columns, float activations.

    The options are those of ``Int4Linear``. group_size: a multiple of 4, or the whole row.
    """

    scheme_name = "sparse24-w4a16"
    op_name = "sparse24_int4_linear"
    base_format = Sparse24(Int4())
    options: ClassVar[dict[str, Any]] = {**_INT4, "symmetric": True, "compute_dtype": None}
    from_float_options: ClassVar[dict[str, Any]] = {**_PRUNED, "range_search": "mse", "compute_dtype": "auto"}
    group_size: int
    symmetric: bool
