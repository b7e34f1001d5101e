"""Schemes: what happens to one layer. Frozen dataclasses of options, with a JSON form that carries a version.

A scheme says which modules it is about (``supports``), why it must leave one alone (``why_not``) and builds
(``build``). A new scheme is one class under ``@register_scheme``; recipes, report and checkpoints then know it by name.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from tilewright.convert import layers
from tilewright.convert.calibrate.rows import (
    MAX_ROWS,
    Found,
    RowSample,
    output_error,
    relative_error,
    search_importance,
    search_smoothing,
)
from tilewright.convert.text import closest
from tilewright.kernels.formats.int4 import resolve_group_size
from tilewright.kernels.formats.ranges import check_range_search
from tilewright.nn import Int4Linear, Int8ActInt4WeightLinear, Int8Linear, Int8WeightOnlyLinear, QuantizedLinear

COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Scheme(ABC):
    """Base of all schemes.

    version: of the JSON form; it grows when a field changes its meaning. about: the layers it takes, in words.
    lossless: a converted layer computes the same but for rounding in float, so heads and adapters are converted too.
    module: the class that it makes, if there is just one.
    """

    version: ClassVar[int] = 1
    about: ClassVar[str]
    module: ClassVar[Any] = None
    lossless: ClassVar[bool] = False

    @property
    def calibrated(self) -> bool:
        """Whether ``build`` can make use of what calibration data tells."""
        return False

    @property
    def needs_data(self) -> bool:
        """Whether nothing can be built without calibration data."""
        return False

    @property
    def sample_rows(self) -> int:
        """Input rows that ``search`` would like to have."""
        return MAX_ROWS

    @classmethod
    @abstractmethod
    def supports(cls, module: nn.Module) -> bool:
        """Whether ``module`` is of a type that this scheme is about, convertible or not."""

    @abstractmethod
    def why_not(self, module: nn.Module) -> str | None:
        """Why a module that it takes must be left alone; None if it can be converted."""

    @abstractmethod
    def build(self, module: nn.Module, **calibration: Any) -> nn.Module:
        """The replacement. ``calibration``: the options of what ``search`` found."""

    def search(self, module: nn.Module, sample: RowSample) -> Found:
        """What sampled inputs tell about how to build the replacement; nothing unless a scheme says otherwise."""
        return Found()

    def weight_error(self, module: nn.Module, replacement: nn.Module) -> float | None:
        """||W' - W|| / ||W|| of the dequantised weight W', where that makes sense."""
        return None

    @classmethod
    def stem(cls) -> str:
        """What tables and presets call the format: ``scheme_name`` of the module that it makes."""
        return getattr(cls.module, "scheme_name", cls.__name__)

    def to_json(self) -> dict[str, Any]:
        """The scheme as JSON-able dict: its name, version and options."""
        return {"scheme": type(self).__name__, "version": self.version, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        changed = {name: value for name, value in dataclasses.asdict(self).items() if value != defaults[name]}
        options = ", ".join(f"{name}={value}" for name, value in changed.items())
        return f"{self.stem()}: {options}" if options else self.stem()


SchemeClass = TypeVar("SchemeClass", bound=type[Scheme])
_registered: dict[str, type[Scheme]] = {}


def register_scheme(scheme: SchemeClass) -> SchemeClass:
    """Class decorator that makes a scheme known by the name of its class. Raises ValueError if the name is taken."""
    if scheme.__name__ in _registered:
        raise ValueError(f"a scheme called {scheme.__name__} is registered already")
    _registered[scheme.__name__] = scheme
    return scheme


def registered_schemes() -> dict[str, type[Scheme]]:
    """All schemes by name."""
    return dict(_registered)


def scheme_from_json(data: Any) -> Scheme:
    """The scheme that ``to_json`` wrote. Raises ValueError for an unknown name, version or option."""
    if not isinstance(data, dict) or not isinstance(data.get("scheme"), str):
        raise ValueError(f"a scheme in JSON is an object with the key 'scheme', not {data!r}")
    options = dict(data)
    name, version = options.pop("scheme"), options.pop("version", None)
    kind = _registered.get(name)
    if kind is None:
        raise ValueError(f"scheme {name!r} is unknown{closest(name, _registered)}; known: {', '.join(_registered)}")
    if version != kind.version:
        raise ValueError(f"scheme {name} has version {version!r}, this Tilewright reads version {kind.version}")
    known = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in known:
            raise ValueError(
                f"scheme {name} has no option {option!r}{closest(option, known)}; known: {', '.join(known)}"
            )
    return kind(**options)


@dataclass(frozen=True)
class _LinearScheme(Scheme):
    """What the schemes for linear layers have in common.

    range_search: "minmax", or "mse", which clips outliers where that lowers the squared error (see ``formats.ranges``).
    """

    range_search: str = "minmax"

    about: ClassVar[str] = "linear layers (nn.Linear, transformers' Conv1D)"

    def __post_init__(self) -> None:
        check_range_search(self.range_search)

    @classmethod
    def supports(cls, module: nn.Module) -> bool:
        """Linear layers of any kind."""
        return layers.is_linear(module)

    def why_not(self, module: nn.Module) -> str | None:
        """See ``layers.why_not_linear``."""
        return layers.why_not_linear(module)

    def options(self, weight: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of ``from_float`` for a layer with this weight."""
        return {"range_search": self.range_search}

    def build(self, module: nn.Module, **calibration: Any) -> QuantizedLinear:
        """The quantised layer, on the device and with the dtype of ``module``."""
        linear = layers.as_linear(module)
        replacement: QuantizedLinear = self.module.from_float(linear, **self.options(linear.weight), **calibration)
        if layers.is_conv1d(module):
            replacement.origin = "Conv1D"
        return replacement

    def search(self, module: nn.Module, sample: RowSample) -> Found:
        """For schemes that quantise activations: the input scales that lose least (``convert.calibrate.rows``)."""
        if not self.calibrated or sample.rows is None:
            return Found()
        # The search needs the order of its candidates, not the last digit of each: the cheap range search will do.
        quick = dataclasses.replace(self, range_search="minmax")
        found = search_smoothing(layers.as_linear(module), sample, lambda **options: quick.build(module, **options))
        if quick == self or not found.options:
            return found
        plain, smoothed = (output_error(module, self.build(module, **o), sample) for o in ({}, found.options))
        return found if plain is None or (smoothed is not None and smoothed < plain) else Found()

    def weight_error(self, module: nn.Module, replacement: nn.Module) -> float | None:
        """See ``Scheme``."""
        weight = layers.as_linear(module).weight
        return relative_error(replacement.dequantize_weight(), weight)  # type: ignore[operator]


def _check_compute_dtype(name: object) -> None:
    if name is not None and name != "auto" and name not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype must be 'auto', None, {' or '.join(map(repr, COMPUTE_DTYPES))}, not {name!r}")


def _compute_dtype(name: str | None, weight: torch.Tensor) -> torch.dtype | None:
    if name == "auto":
        return torch.bfloat16 if weight.dtype == torch.float32 else None
    return None if name is None else COMPUTE_DTYPES[name]


def _check_group_size(group_size: object) -> None:
    if group_size is not None and (not isinstance(group_size, int) or isinstance(group_size, bool)):
        raise ValueError(f"group_size must be an int or None (whole row), not {group_size!r}")
    resolve_group_size(1, group_size)


class _ImportanceSearch(_LinearScheme):
    """What the weight-only schemes do with calibration data: see ``calibrate.search_importance``."""

    @property
    def calibrated(self) -> bool:
        """If the range is searched."""
        return self.range_search == "mse"

    def search(self, module: nn.Module, sample: RowSample) -> Found:
        """Weigh the errors of the weight by its inputs, if the range is searched at all and the output gains."""
        if not self.calibrated:
            return Found()
        return search_importance(module, sample, lambda **options: self.build(module, **options))


@register_scheme
@dataclass(frozen=True)
class Int8Dynamic(_LinearScheme):
    """W8A8: int8 weights with a scale per output channel, activations quantised per row as they come.

    With calibration data the converter also finds a scale for each input channel that moves outliers of the activations
    into the weight (SmoothQuant, Xiao et al. 2022, equation 4, the exponent searched for each layer).
    """

    module: ClassVar[Any] = Int8Linear

    @property
    def calibrated(self) -> bool:
        """Always: for the input scales."""
        return True


@register_scheme
@dataclass(frozen=True)
class Int8WeightOnly(_ImportanceSearch):
    """W8A16: int8 weights with a scale per output channel, multiplied in a 16-bit float type.

    compute_dtype: what weight and activation are rounded to for the product: "bfloat16", "float16", None (the dtype of
    the activation) or "auto": bfloat16 for a float32 weight, else None.
    """

    compute_dtype: str | None = "auto"

    module: ClassVar[Any] = Int8WeightOnlyLinear

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_compute_dtype(self.compute_dtype)

    def options(self, weight: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of ``from_float``."""
        return {**super().options(weight), "compute_dtype": _compute_dtype(self.compute_dtype, weight)}


@dataclass(frozen=True)
class _Int4Scheme(_LinearScheme):
    """group_size: input columns that share a scale; None or -1 is the whole row. symmetric: no zero points."""

    group_size: int | None = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_group_size(self.group_size)
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric must be True or False, not {self.symmetric!r}")

    def options(self, weight: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of ``from_float``."""
        return {**super().options(weight), "group_size": self.group_size, "symmetric": self.symmetric}


@register_scheme
@dataclass(frozen=True)
class Int4WeightOnly(_Int4Scheme, _ImportanceSearch):
    """W4A16: int4 weights with a scale (and zero point) for each group of columns, multiplied in a 16-bit float type.

    compute_dtype: as of ``Int8WeightOnly``.
    """

    range_search: str = "mse"
    symmetric: bool = False
    compute_dtype: str | None = "auto"

    module: ClassVar[Any] = Int4Linear

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_compute_dtype(self.compute_dtype)

    def options(self, weight: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of ``from_float``."""
        return {**super().options(weight), "compute_dtype": _compute_dtype(self.compute_dtype, weight)}


@register_scheme
@dataclass(frozen=True)
class Int8ActInt4Weight(_Int4Scheme):
    """W4A8: int4 weights in groups, activations quantised to int8 per row; calibrated as ``Int8Dynamic`` is."""

    range_search: str = "mse"

    module: ClassVar[Any] = Int8ActInt4WeightLinear

    @property
    def calibrated(self) -> bool:
        """Always: for the input scales."""
        return True
