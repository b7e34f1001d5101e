"""What a weight is: its operands, how it is quantised, restored, checked, drawn at random and counted.

A format is one file of this folder: the layout, pure functions on tensors, and a frozen dataclass over them that the
operators, the modules and the benchmarks read. Its fields are the options that a weight has, its operands have the
names and the order of the operators' schemas. ``Float`` below is the shortest one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

from tilewright.kernels.formats.ranges import all_finite

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INPUT_DTYPES = (*SCALE_DTYPES, torch.float64)

Operands = dict[str, torch.Tensor | None]
Format = TypeVar("Format", bound="WeightFormat")


class Spec(NamedTuple):
    """Shape and dtype of one operand."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Memory for the operand."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


class Draw:
    """Random tensors on one device, from one seed; on "meta" nothing is drawn."""

    def __init__(self, device: torch.device | str = "cpu", seed: int = 0) -> None:
        kind = torch.device(device)
        generator = None if kind.type == "meta" else torch.Generator(kind).manual_seed(seed)
        self._options: dict[str, Any] = {"device": kind, "generator": generator}

    def normal(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Mean 0, variance 1."""
        return torch.randn(*size, **self._options).to(dtype)

    def positive(self, *size: int) -> torch.Tensor:
        """float32 between 0.5 and 1.5."""
        return torch.rand(*size, dtype=torch.float32, **self._options) + 0.5

    def integers(self, low: int, high: int, *size: int, dtype: torch.dtype) -> torch.Tensor:
        """``low`` to ``high - 1``, all equally likely."""
        return torch.randint(low, high, size, dtype=dtype, **self._options)

    def words(self, *size: int) -> torch.Tensor:
        """int32 of 32 random bits."""
        return self.integers(-(2**31), 2**31, *size, dtype=torch.int32)


class WeightFormat(ABC):
    """One way to store a weight [N, K]. Subclasses are frozen dataclasses of the options."""

    name: ClassVar[str]
    #: All operands, also those that some weights of this format lack, in the order of the operators' schemas.
    NAMES: ClassVar[tuple[str, ...]]

    @classmethod
    @abstractmethod
    def of_arguments(cls: type[Format], arguments: Mapping[str, Any], k: int) -> Format:
        """The format of the weight [N, ``k``] that an operator was called with: undoes ``operands`` and ``options``."""

    @classmethod
    @abstractmethod
    def check(cls, op: str, arguments: Mapping[str, Any], k: int) -> int:
        """N, if the weight among the arguments of ``op`` fits activations of ``k`` columns.

        Raises TypeError or ValueError, which name operator and argument. Values are not looked at: that would wait for
        the device.
        """

    def for_layer(self, k: int, dtype: torch.dtype, options: Mapping[str, Any]) -> WeightFormat:
        """This format for a layer of ``k`` columns and ``dtype``, with those of the options of its module that say how
        the weight is stored.
        """
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """``NAMES`` as far as operators of this very format have them."""
        return self.NAMES

    def options(self, k: int) -> dict[str, Any]:
        """Arguments of the operators that say about the weight what its operands do not."""
        return {}

    def facts(self, k: int) -> dict[str, Any]:
        """Fields of ``Problem`` that describe the weight beyond its size."""
        return {}

    @abstractmethod
    def operands(self, n: int, k: int) -> dict[str, Spec]:
        """What a weight [``n``, ``k``] is stored as, by name and in order; what it lacks is left out."""

    @abstractmethod
    def quantize(
        self, weight: torch.Tensor, range_search: str = "minmax", importance: torch.Tensor | None = None
    ) -> Operands:
        """The operands of a float ``weight`` [N, K]; None for those that a weight of this kind lacks.

        range_search, importance: see ``formats.ranges``. Raises TypeError or ValueError for a weight that is not a
        finite float matrix, or that the format cannot hold.
        """

    def requantize(self, weight: torch.Tensor, range_search: str = "minmax", eps: float = 0.0) -> Operands:
        """As ``quantize``, for a weight that was this format's before somebody wrote into it. What is still of it, but
        for a factor, should not be rounded anew. eps: relative rounding error of the dtype that it was written in.
        """
        return self.quantize(weight, range_search)

    def replace_rows(
        self, operands: Mapping[str, torch.Tensor | None], rows: torch.Tensor, new: Mapping[str, torch.Tensor | None]
    ) -> Operands:
        """``operands`` with the rows where ``rows``, bool [N], is true taken from ``new``, which holds no others."""
        return {name: None if t is None else t.index_put((rows,), present(name, new)) for name, t in operands.items()}

    @abstractmethod
    def dequantize(
        self, operands: Mapping[str, torch.Tensor | None], k: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The weight [N, ``k``] in ``dtype``; products are taken in float32 (float64 if that is asked for)."""

    @abstractmethod
    def sample(self, draw: Draw, n: int, k: int, spread: float | None = None) -> Operands:
        """Random operands of a weight [``n``, ``k``].

        spread: about the standard deviation of the weight. By default such that sums over ``k`` are of order 1 where
        activations are.
        """

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of a weight [``n``, ``k``]."""
        return sum(spec.nbytes for spec in self.operands(n, k).values())

    # ---- by which the parts of a weight are checked, also where another format holds the values
    #: Dtype of the first operand.
    values_dtype: ClassVar[torch.dtype]

    @classmethod
    def check_values_dtype(cls, op: str, name: str, values: torch.Tensor) -> None:
        """The first operand, which ``op`` calls ``name``, has the right dtype."""
        check_dtype(op, name, values, cls.values_dtype)

    @classmethod
    def check_scales(cls, op: str, arguments: Mapping[str, Any], n: int, k: int) -> None:
        """The other operands fit a weight [``n``, ``k``]."""
        if not cls.NAMES[1:]:
            return
        specs = cls.of_arguments(arguments, k).operands(n, k)
        for name in cls.NAMES[1:]:
            if name in specs:
                check_operand(op, name, arguments[name], specs[name])


def default_spread(k: int) -> float:
    """What makes a sum of ``k`` products with values of order 1 be of order 1."""
    return max(k, 1) ** -0.5


def present(name: str, operands: Mapping[str, torch.Tensor | None]) -> torch.Tensor:
    """The operand called ``name``. Raises ValueError if it is missing."""
    found = operands.get(name)
    if found is None:
        raise ValueError(f"a weight without its {name}")
    return found


def check_dtype(op: str, name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError unless ``value`` is of ``dtype``."""
    if value.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {str(dtype).removeprefix('torch.')}, not {value.dtype}")


def check_operand(op: str, name: str, value: torch.Tensor, spec: Spec) -> None:
    """Raise TypeError or ValueError unless ``value`` is as ``spec`` says."""
    check_dtype(op, name, value, spec.dtype)
    if value.shape != spec.shape:
        raise ValueError(f"{op}: {name} must have shape {list(spec.shape)}, not {list(value.shape)}")


@dataclass(frozen=True)
class Float(WeightFormat):
    """A weight that is not quantised: ``weight`` [N, K] of ``dtype``."""

    dtype: torch.dtype = torch.float32

    name = "float"
    NAMES = ("weight",)

    @classmethod
    def of_arguments(cls, arguments: Mapping[str, Any], k: int) -> Float:
        """The format of the weight among an operator's arguments."""
        return cls(arguments["weight"].dtype)

    @classmethod
    def check(cls, op: str, arguments: Mapping[str, Any], k: int) -> int:
        """N, if the weight fits activations of ``k`` columns."""
        weight = arguments["weight"]
        cls.check_values_dtype(op, "weight", weight)
        if weight.dim() != 2 or weight.shape[1] != k:
            raise ValueError(f"{op}: weight must be a matrix [N, {k}], not of shape {list(weight.shape)}")
        return int(weight.shape[0])

    @classmethod
    def check_values_dtype(cls, op: str, name: str, values: torch.Tensor) -> None:
        """Values are float."""
        if values.dtype not in INPUT_DTYPES:
            raise TypeError(f"{op}: {name} must be a float tensor of 16, 32 or 64 bits, not {values.dtype}")

    def for_layer(self, k: int, dtype: torch.dtype, options: Mapping[str, Any]) -> Float:
        """values_dtype: by default that of the layer. Raises ValueError for a dtype that is no float of 16 bits or
        more.
        """
        values_dtype = options["values_dtype"] or dtype
        if values_dtype not in INPUT_DTYPES:
            raise ValueError(f"values_dtype must have 16, 32 or 64 bits, not {values_dtype}")
        return Float(values_dtype)

    def operands(self, n: int, k: int) -> dict[str, Spec]:
        """``weight`` alone."""
        return {"weight": Spec((n, k), self.dtype)}

    def quantize(
        self, weight: torch.Tensor, range_search: str = "minmax", importance: torch.Tensor | None = None
    ) -> Operands:
        """Rounded to ``dtype``. Raises ValueError for a weight that overflows it."""
        rounded = weight.detach().to(self.dtype)
        if not all_finite(rounded):
            raise ValueError(f"the weight overflows {self.dtype}")
        return {"weight": rounded}

    def dequantize(
        self, operands: Mapping[str, torch.Tensor | None], k: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The weight in ``dtype``."""
        return present("weight", operands).to(dtype)

    def sample(self, draw: Draw, n: int, k: int, spread: float | None = None) -> Operands:
        """Normally distributed."""
        weight = draw.normal(n, k) * (default_spread(k) if spread is None else spread)
        return {"weight": weight.to(self.dtype)}
