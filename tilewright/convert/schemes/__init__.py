"""What happens to one layer: a frozen dataclass for each scheme."""

from tilewright.convert.schemes.base import Scheme, register_scheme, registered_schemes, scheme_from_json
from tilewright.convert.schemes.convolution import Fuse, Int8Static, Sparse24Conv
from tilewright.convert.schemes.linear import (
    Int4WeightOnly,
    Int8ActInt4Weight,
    Int8Dynamic,
    Int8StaticInputs,
    Int8WeightOnly,
)
from tilewright.convert.schemes.sparse24 import Sparse24, Sparse24Int4, Sparse24Int8
