"""Drop-in modules that store a weight in a form of their own, and show it as that of the layer that was there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from tilewright.kernels.formats.ranges import check_range_search
from tilewright.kernels.formats.weight import Operands, WeightFormat
from tilewright.nn.float_weight import FloatWeight, check_like
from tilewright.nn.foreign_saves import check_who_saves
from tilewright.nn.kinds import DropIn
from tilewright.nn.stored_weight import Stored, note_read

#: What modules call the operand that operators call ``weight``: there, that is the float weight.
CODES = "weight_codes"


def stored_name(operand: str) -> str:
    """The name in modules, and so in state dicts, of an operand of a weight."""
    return CODES if operand == "weight" else operand


class WeightHolder(DropIn):
    """A drop-in module whose ``weight`` reads and writes as the float weight, whatever is stored.

    What is stored is a matrix [N, K] in some format, and how the weight is that matrix is the subclass's to say.
    """

    #: How the matrix is stored, but for the options of a layer.
    base_format: ClassVar[WeightFormat | None] = None
    #: Options of the constructor that the subclass has beyond those of every layer, and their defaults.
    options: ClassVar[dict[str, Any]] = {}
    _before: ClassVar[Mapping[str, str]] = {"weight": CODES}
    #: The range of a weight that is written, as ``from_float`` was told.
    range_search: str = "minmax"

    #: Buffers that the weight is made of, if the layer has them.
    _held_names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if cls.base_format is not None:
            scale = ["channel_scale"] if "channel_scale" in cls.options else []
            cls._held_names = (*map(stored_name, cls.base_format.names), *scale)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        check_who_saves()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    # ---- what subclasses provide
    def _weight_size(self) -> tuple[int, ...]:
        """The shape of the weight of the layer that was there."""
        raise NotImplementedError(f"{type(self).__name__}._weight_size")

    def _columns(self) -> int:
        """K."""
        raise NotImplementedError(f"{type(self).__name__}._columns")

    def _matrix_of(self, weight: torch.Tensor) -> torch.Tensor:
        """The matrix that a weight is."""
        raise NotImplementedError(f"{type(self).__name__}._matrix_of")

    def _weight_of(self, matrix: torch.Tensor) -> torch.Tensor:
        """The weight, contiguous, that a matrix is."""
        raise NotImplementedError(f"{type(self).__name__}._weight_of")

    def _shape_of(self, operand: str) -> tuple[int, ...] | None:
        """The shape in which the module holds an operand, if that is another than the format's."""
        return None

    def _check_rows(self, rows: torch.Tensor) -> None:
        """Say what becomes of rows that are written."""
        return

    # ---- public
    @property
    def weight(self) -> torch.Tensor:
        """The float weight, in the shape and dtype of the layer that was there; see ``FloatWeight``.

        What is written into it, or assigned, is stored as ``from_float`` would store it, with ``range_search`` and the
        group size of this layer; rows that do not change stay as they are to the bit. Raises TypeError or ValueError
        for one of another shape, dtype or device, and for one that is not finite.
        In a graph that PyTorch compiles or exports it is a value: what the graph writes into it in place is not stored.
        """
        held = self._held_weight()
        if torch.compiler.is_compiling():
            return self._decoded(held)
        note_read(self)
        return FloatWeight(Stored(self, held))

    def __setattr__(self, name: str, value: Any) -> None:
        # ``nn.Module`` would register a parameter of that name before it asks the property.
        if name == "weight":
            self._take(value)
        else:
            super().__setattr__(name, value)

    # ---- internal
    def _search(self, range_search: str | None) -> None:
        """Remember an option of ``from_float``, if it is not the usual one."""
        if range_search not in (None, type(self).range_search):
            check_range_search(range_search)
            self.range_search = range_search

    def _search_config(self) -> dict[str, str]:
        return {"range_search": self.range_search} if "range_search" in vars(self) else {}

    def _held_weight(self) -> dict[str, torch.Tensor]:
        """What the weight is made of, by the names of the buffers."""
        buffers = self._buffers
        return {name: tensor for name in self._held_names if (tensor := buffers.get(name)) is not None}

    def _operands_of(self, held: Mapping[str, torch.Tensor]) -> tuple[WeightFormat, Operands]:
        """The format of the matrix, and its operands."""
        if self.base_format is None:
            raise NotImplementedError(f"{type(self).__name__}.base_format")
        operands = {name: held.get(stored_name(name)) for name in self.base_format.names}
        for name, tensor in operands.items():
            if tensor is not None and self._shape_of(name) is not None:
                operands[name] = tensor.flatten(1)
        given = {**operands, **{name: vars(self)[name] for name in self.options if name in vars(self)}}
        return self.base_format.of_arguments(given, self._columns()), operands

    def _matrix(self, held: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The matrix in float32, the channel scale taken back."""
        stored, operands = self._operands_of(held)
        matrix, scale = stored.dequantize(operands, self._columns()), held.get("channel_scale")
        return matrix if scale is None else matrix * scale

    def _title(self) -> str:
        return f"the weight of {self._label()}"

    def _weight_dtype(self, held: Mapping[str, torch.Tensor]) -> torch.dtype:
        return self.dtype

    def _decoded(self, held: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._weight_of(self._matrix(held).to(self.dtype))

    def _encoded(self, weight: torch.Tensor, held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What to hold for ``weight``, in the place of ``held``."""
        if weight.is_meta:
            return held
        matrix, old = self._matrix_of(weight.detach()), self._matrix(held)
        same = matrix == old.to(matrix.dtype)
        changed = ~same.all(1)
        if not changed.any():
            return held
        stored, operands = self._operands_of(held)
        # What is as it was read is taken as it was before it was rounded to the layer's dtype.
        rows, scale = torch.where(same, old, matrix.float())[changed], held.get("channel_scale")
        try:
            self._check_rows(rows)
            rows = rows if scale is None else rows / scale
            made = stored.requantize(rows, self.range_search, torch.finfo(matrix.dtype).eps)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self._label()} cannot store the weight that was written: {error}") from error
        new = stored.replace_rows(operands, changed, made)
        shaped = {
            name: tensor.view(self._shape_of(name) or tensor.shape)
            for name, tensor in new.items()
            if tensor is not None
        }
        return {**held, **{stored_name(name): tensor for name, tensor in shaped.items()}}

    def _take(self, weight: Any) -> None:
        """Hold another weight, in new memory; with a layer that stores it in the same way it is shared."""
        held = self._held_weight()
        if isinstance(weight, FloatWeight) and self._stores_like(weight._stored):
            new = weight._stored.tensors
        else:
            check_like(self, weight, FloatWeight(Stored(self, held)))
            if weight.requires_grad and not isinstance(weight, nn.Parameter):
                raise RuntimeError(
                    f"{self._title()} is stored in another form, outside of any graph: detach() it first"
                )
            with torch.no_grad():
                new = self._encoded(weight, held)
        for name, tensor in new.items():
            table: dict[str, Any] = self._parameters if name in self._parameters else self._buffers
            table[name] = tensor

    def _stores_like(self, other: Stored) -> bool:
        """Whether what ``other`` holds could be this layer's."""
        held, owner = self._held_weight(), other.owner
        if type(owner) is not type(self) or (owner is not self and "channel_scale" in held):
            return False
        ours, theirs = (
            {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in each.items()}
            for each in (held, other.tensors)
        )
        same = self.base_format is None or self._operands_of(held)[0] == owner._operands_of(other.tensors)[0]
        return same and ours == theirs
