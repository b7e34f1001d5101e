"""Drop-in modules: what holds the quantised parameters and calls the operators."""

from tilewright.nn.conv import ConvBnAct2d
from tilewright.nn.conv_int8 import Int8ConvBnAct2d
from tilewright.nn.conv_layer import ConvLayer
from tilewright.nn.conv_sparse24 import Sparse24ConvBnAct2d
from tilewright.nn.int8_static_linear import Int8StaticLinear
from tilewright.nn.linear import (
    Int4Linear,
    Int8ActInt4WeightLinear,
    Int8Linear,
    Int8WeightOnlyLinear,
    Sparse24Int4Linear,
    Sparse24Int8Linear,
    Sparse24Linear,
)
from tilewright.nn.quantized_linear import QuantizedLinear
from tilewright.nn.taken_over import FoldedBatchNorm, FusedActivation

__all__ = [
    "ConvBnAct2d",
    "ConvLayer",
    "FoldedBatchNorm",
    "FusedActivation",
    "Int4Linear",
    "Int8ActInt4WeightLinear",
    "Int8ConvBnAct2d",
    "Int8Linear",
    "Int8StaticLinear",
    "Int8WeightOnlyLinear",
    "QuantizedLinear",
    "Sparse24ConvBnAct2d",
    "Sparse24Int4Linear",
    "Sparse24Int8Linear",
    "Sparse24Linear",
]
