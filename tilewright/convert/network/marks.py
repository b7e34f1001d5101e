"""What becomes of marks in a graph: which float tensors an int8 tensor was made of, and is to be marked like.

``nn.quantized_ops`` says what marks are. A tensor may have several sets of them, one of each float that was quantised.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch import fx

from tilewright.nn import quantized_ops

Marks = tuple[fx.Node, ...]


class MarkWriter:
    """Writes into ``graph`` what makes marks."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        #: Of each int8 tensor, and of floats that were quantised.
        self.of: dict[fx.Node, Marks] = {}

    def quantize(self, x: fx.Node, scale: fx.Node, zero_point: fx.Node, image_dims: int, after: fx.Node) -> fx.Node:
        """``x`` in int8, written behind ``after``."""
        with self.graph.inserting_after(after):
            pair = self.graph.call_function(quantized_ops.quantize, (x, scale, image_dims, zero_point))
        with self.graph.inserting_after(pair):
            marks = self.graph.call_function(operator.getitem, (pair, 1))
            q = self.graph.call_function(operator.getitem, (pair, 0))
        self.of[q] = self.of[x] = (marks,)
        return q

    def joined(self, parts: Iterable[fx.Node | None]) -> Marks:
        """Of what is made of int8 tensors and floats, which keep what is in them."""
        return tuple(dict.fromkeys(each for part in parts if part is not None for each in self.of.get(part, ())))

    def absorbed(self, parts: Iterable[fx.Node | None], image_dims: int, before: fx.Node) -> Marks:
        """Of an int8 tensor that ``before`` makes of these, floats among them."""
        parts = list(parts)
        for part in parts:
            if part is not None and part not in self.of:
                with self.graph.inserting_before(before):
                    self.of[part] = (self.graph.call_function(quantized_ops.marks_of, (part, image_dims)),)
        return self.joined(parts)

    def reshaped(self, node: fx.Node, source: fx.Node) -> Marks:
        """Of ``node``, which holds the values of ``source`` in the same order."""
        found = []
        for marks in self.of[source]:
            with self.graph.inserting_after(node):
                found.append(self.graph.call_function(quantized_ops.reshaped_marks, (marks, source, node)))
        return tuple(found)
