"""A place in an ONNX graph where nodes are written: what stands for one operator of Tilewright."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tilewright.deploy.onnx.symbols import arguments_of


class Place:
    """In front of ``node``, a node of the domain ``tilewright``, whose arguments are attributes of this object's.

    ir: the module ``onnx_ir``, which is an optional dependency and so is not imported at the head of a file.
    accuracy_level: of MatMulNBits.
    """

    def __init__(self, ir: Any, node: Any, accuracy_level: int):
        self.ir, self.node, self.types = ir, node, ir.DataType
        self.accuracy_level = accuracy_level
        self.op = node.op_type
        given = list(node.inputs)
        declared = arguments_of(self.op)
        tensors = [each.name for each in declared if "Tensor" in str(each.type)]
        self.arguments: dict[str, Any] = dict.fromkeys(tensors)
        self.arguments.update(zip(tensors, given, strict=False))
        for each in declared:
            if each.name not in tensors:
                attribute = node.attributes.get(each.name)
                self.arguments[each.name] = None if attribute is None else attribute.value

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The values of a weight. Raises ValueError if the argument is computed."""
        value = self.arguments[name].const_value
        if value is None:
            raise ValueError(f"{self.op}: its {name} is computed by the model, so it cannot be packed for ONNX")
        raw = getattr(value, "raw", None)
        return raw.detach().cpu() if isinstance(raw, torch.Tensor) else torch.from_numpy(np.array(value.numpy()))

    def constant(self, name: str, value: Any, dtype: Any = None) -> Any:
        """A new initializer. value: an array, a tensor or a number. name: for the reader, made unique."""
        if isinstance(value, torch.Tensor):
            array = np.ascontiguousarray(value.detach().cpu().numpy())
        else:
            array = np.asarray(value, None if dtype is None else dtype.numpy())
        tensor = self.ir.tensor(array)
        graph, unique, count = self.node.graph, name, 0
        while unique in graph.initializers:
            unique, count = f"{name}_{count}", count + 1
        made = self.ir.Value(
            name=unique, type=self.ir.TensorType(tensor.dtype), shape=self.ir.Shape(tensor.shape), const_value=tensor
        )
        graph.register_initializer(made)
        return made

    def write(
        self,
        kind: str,
        inputs: Sequence[Any],
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        like: Any = None,
        dtype: Any = None,
    ) -> Any:
        """A new node with one result. like: a value of the same shape. dtype: of the result."""
        node = self.ir.node(kind, inputs, attributes, domain=domain)
        self.node.graph.insert_before(self.node, node)
        (result,) = node.outputs
        if like is not None:
            result.shape, result.type = like.shape, like.type
        if dtype is not None:
            result.type = self.ir.TensorType(dtype)
        return result

    def cast(self, value: Any, dtype: Any) -> Any:
        """``value`` in another element type, if it is not already."""
        if value.dtype == dtype:
            return value
        return self.write("Cast", [value], {"to": int(dtype)}, dtype=dtype)

    def derived(self, argument: str, suffix: str, value: torch.Tensor) -> Any:
        """A new initializer that was made from a weight, called after it: ``layer.weight`` -> ``layer.suffix``."""
        prefix = self.arguments[argument].name.rpartition(".")[0]
        return self.constant(f"{prefix}.{suffix}" if prefix else suffix, value)

    def replace(self, *results: Any) -> None:
        """Let whoever read the node's results read ``results``; the node goes."""
        for old, new in zip(self.node.outputs, results, strict=True):
            new.shape, new.type = old.shape, old.type
            self.ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.node.graph.remove(self.node, safe=True)
