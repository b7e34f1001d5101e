"""What happens to all layers of one kind while a model is converted: the steps that the converter walks through.

A scheme names the conversion that replaces its layers. A new kind of layer is one class here under
``@register_conversion`` and the schemes that name it; the converter then knows it.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import nn

from tilewright.convert import layers
from tilewright.convert.calibrate import Memory
from tilewright.convert.plan import Plan, Planned
from tilewright.convert.progress import Rest
from tilewright.convert.record import Record
from tilewright.convert.structure import Places
from tilewright.convert.timing import Reached


@dataclass
class Job:
    """What the conversions of one model share.

    places: the model, and where its modules stand. record: what becomes of each layer. with_data: whether sample inputs
    will go through the model. reached: what reaches layers on the example inputs. memory: counts what is held of
    that which reaches layers. keep_if_faster, progress: as of ``convert_model``. rest: says how long the rest
    may take. items: how many sample inputs there are, if that is known.
    """

    places: Places
    plan: Plan
    record: Record
    with_data: bool = False
    reached: dict[str, list[Reached]] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    keep_if_faster: bool = False
    progress: bool | None = None
    rest: Rest | None = None
    items: int | None = None

    @property
    def model(self) -> nn.Module:
        """The root as it is now."""
        return self.places.root

    def replace(self, name: str, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` in the place of the layer ``old``, with what the user had put on that."""
        layers.carry_over(old, new)
        new.layer_name = name  # type: ignore[assignment]
        self.places.replace(old, new)


class Conversion(ABC):
    """The layers of one kind, ``planned`` by name; there may be none.

    Every step is taken by all conversions before any takes the next: ``prepare``, ``observing`` while sample inputs go
    through the model, ``replace``, ``finish``. The last is taken also after a failure of one before.

    whole_model: whether its layers hand each other values in a form of their own. Such conversions come first, as they
    look at the float model, and their layers are timed together and kept, all or none.
    """

    whole_model: ClassVar[bool] = False

    def __init__(self, job: Job, planned: dict[str, Planned]):
        self.job, self.planned = job, planned

    @classmethod
    def check(cls, model: nn.Module) -> None:
        """Raise ValueError if ``model`` is in no state to have such layers replaced."""
        return

    def prepare(self, sample: Any) -> None:
        """What comes before sample inputs go through the model. sample: the first of them, or None."""
        return

    def observing(self) -> AbstractContextManager[object]:
        """While this is open, sample inputs go through the model."""
        return contextlib.nullcontext()

    @abstractmethod
    def replace(self, samples: list[Any]) -> None:
        """Put every replacement in its place. samples: the first of the sample inputs, if there are any."""

    def finish(self) -> None:
        """Leave the model and the record consistent, whatever has become of the steps before."""
        return


ConversionClass = TypeVar("ConversionClass", bound=type[Conversion])
_registered: dict[str, type[Conversion]] = {}


def register_conversion(name: str) -> Callable[[ConversionClass], ConversionClass]:
    """Class decorator that makes a conversion known by the name that its schemes give."""

    def register(conversion: ConversionClass) -> ConversionClass:
        if name in _registered:
            raise ValueError(f"a conversion of {name} is registered already")
        _registered[name] = conversion
        return conversion

    return register


def conversion_of(planned: Planned) -> type[Conversion]:
    """What replaces a planned layer. Raises ValueError for a scheme that names no conversion there is."""
    name = planned.scheme.conversion
    if name not in _registered:
        raise ValueError(f"{planned.scheme} asks for a conversion of {name}; known: {', '.join(_registered)}")
    return _registered[name]


def conversions_of(plan: Plan) -> dict[type[Conversion], dict[str, Planned]]:
    """Every conversion, in the order in which they go, with the layers planned for it."""
    order: Iterable[type[Conversion]] = sorted(_registered.values(), key=lambda kind: not kind.whole_model)
    return {kind: {name: each for name, each in plan.convert.items() if conversion_of(each) is kind} for kind in order}
