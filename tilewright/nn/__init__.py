"""Drop-in modules: what holds the quantised parameters and calls the operators."""

from tilewright.nn.conv import ConvBnAct2d
from tilewright.nn.conv_folded import FoldedBatchNorm
from tilewright.nn.conv_int8 import Int8ConvBnAct2d
from tilewright.nn.conv_layer import ConvLayer
from tilewright.nn.fused_activation import FusedActivation
from tilewright.nn.int4_linear import Int4Linear, Int8ActInt4WeightLinear
from tilewright.nn.int8_linear import Int8Linear, Int8WeightOnlyLinear
from tilewright.nn.quantized_linear import QuantizedLinear

__all__ = [
    "ConvBnAct2d",
    "ConvLayer",
    "FoldedBatchNorm",
    "FusedActivation",
    "Int4Linear",
    "Int8ActInt4WeightLinear",
    "Int8ConvBnAct2d",
    "Int8Linear",
    "Int8WeightOnlyLinear",
    "QuantizedLinear",
]
