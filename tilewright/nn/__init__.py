"""Drop-in modules: what holds the quantised parameters and calls the operators."""

from tilewright.nn.fused_activation import FusedActivation
from tilewright.nn.int4_linear import Int4Linear, Int8ActInt4WeightLinear
from tilewright.nn.int8_linear import Int8Linear, Int8WeightOnlyLinear
from tilewright.nn.quantized_linear import QuantizedLinear

__all__ = [
    "FusedActivation",
    "Int4Linear",
    "Int8ActInt4WeightLinear",
    "Int8Linear",
    "Int8WeightOnlyLinear",
    "QuantizedLinear",
]
