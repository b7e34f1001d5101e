"""Schemes: what happens to one layer. Frozen dataclasses of options, with a JSON form that carries a version.

A scheme says which modules it is about (``supports``), why it must leave one alone (``why_not``) and what takes its
place (``build``). A new scheme is one class under ``@register_scheme``; recipes, report and checkpoints then know it by
name.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import nn

from tilewright.convert.calibrate import MAX_ROWS, Found, RowSample
from tilewright.convert.text import closest


@dataclass(frozen=True)
class Scheme(ABC):
    """Base of all schemes.

    version: of the JSON form; it grows when a field changes its meaning. about: the layers it takes, in words.
    lossless: a converted layer computes the same but for rounding in float, so heads and adapters are converted too.
    module: the class that it makes, if there is just one. conversion: which of the registered ``Conversion``s does the
    replacing.
    """

    version: ClassVar[int] = 1
    about: ClassVar[str]
    module: ClassVar[Any] = None
    conversion: ClassVar[str] = "linear layers"
    lossless: ClassVar[bool] = False

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Refuse options that the scheme does not have. Raises TypeError, which names those that have them."""
        known = _options(cls)
        for option in options:
            if option not in known:
                others = [kind.__name__ for kind in _registered.values() if option in _options(kind)]
                having = f"; {', '.join(others)} have it" if others else closest(option, known)
                raise TypeError(f"{cls.__name__} has no option {option!r}{having}; known: {', '.join(known)}")
        return super().__new__(cls)

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
    known = _options(kind)
    for option in options:
        if option not in known:
            raise ValueError(
                f"scheme {name} has no option {option!r}{closest(option, known)}; known: {', '.join(known)}"
            )
    return kind(**options)


def _options(kind: type[Scheme]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
