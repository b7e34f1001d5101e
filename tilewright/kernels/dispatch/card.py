"""The card of an operator: all that is said of it, in one place.

``kernels/<operator>/operator.py`` holds the cards of its folder and is found by its name: the operator's schema, what
it demands of its arguments, the problem that a call poses, sample arguments, implementations in order of preference,
tuned kernels. Whatever goes through all operators reads it off ``cards()``.

Implementations and kernels are named by strings, ".module:function" in the card's own package, so that a card imports
neither Triton nor a kernel:

    CARD = Card(
        "int8_linear",
        __package__,
        "(Tensor x, ...) -> Tensor",
        ...
        implementations=(
            on_gpu("Triton, tiles", ".triton_tile"),
            prepared_on_cpu("C kernel", "..cpu.linear:prepare_int8", ".cpu:why_not_native"),
            everywhere("reference", ".reference"),
        ),
    )
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilewright.kernels.dispatch.derivatives import Fold
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import Implementation, imported
from tilewright.kernels.formats.weight import Draw, WeightFormat

Arguments = Mapping[str, Any]
Gradients = Callable[[torch.Tensor, Arguments, frozenset[str]], Mapping[str, "torch.Tensor | None"]]
#: The last implementation of each operator: the definition, right everywhere, and slow.
REFERENCE = "reference"


@dataclass(frozen=True)
class Way:
    """An implementation as a card names it: see ``on_cpu``, ``on_gpu`` and ``everywhere``. device: where it runs."""

    name: str
    target: str
    device: str = ""
    why_not: str | None = None
    prepare: str | None = None
    handed_on: str | None = None

    def of(self, card: Card) -> Implementation:
        """The implementation of the card's operator; paths without a function mean the one named like it."""
        absolute = functools.partial(_absolute, card)
        prepare = None if self.prepare is None else absolute(self.prepare)
        handed_on = None if self.handed_on is None else _late(absolute(self.handed_on))
        target = absolute(self.target) if self.target else ""
        return Implementation(self.name, card.name, self._declining(card), target, prepare, handed_on, card.wishes)

    def _declining(self, card: Card) -> Callable[[Problem], str | None]:
        own = None if self.why_not is None else _late(_absolute(card, self.why_not))

        def why_not(problem: Problem) -> str | None:
            if self.device and problem.device != self.device:
                where = "the CPU" if self.device == "cpu" else "a GPU"
                return f"runs on {where}, not on {problem.device}"
            # The module may import Triton, so it must not be touched where there is none.
            if self.device == "cuda" and importlib.util.find_spec("triton") is None:
                return "Triton is not installed"
            return None if own is None else own(problem)

        return why_not


def on_cpu(name: str, target: str, why_not: str | None = None) -> Way:
    """An implementation on a CPU. why_not: by default the function of that name beside ``target``."""
    return Way(name, target, "cpu", why_not or _beside(target))


def prepared_on_cpu(name: str, prepare: str, why_not: str | None = None) -> Way:
    """An implementation on a CPU that is a function of x and the residual once the other arguments are known."""
    return Way(name, "", "cpu", why_not or _beside(prepare), prepare)


def on_gpu(name: str, module: str) -> Way:
    """The function named like the operator, and ``why_not``, of a module that needs Triton."""
    return Way(name, module, "cuda", _beside(module))


def everywhere(
    name: str, target: str, why_not: str | None = None, prepare: str | None = None, handed_on: str | None = None
) -> Way:
    """An implementation for every device; without ``why_not`` it takes every problem."""
    return Way(name, target, "", why_not, prepare, handed_on)


@dataclass(frozen=True)
class Kernel:
    """A tuned Triton kernel behind an operator. module: as in a card. problem: that the kernel is asked about, from the
    operator's.
    """

    module: str
    problem: Callable[[Problem], Problem] = lambda problem: problem


@dataclass(frozen=True)
class Card:
    """One operator ``tilewright::name``.

    package: of its folder. schema: without the name. check: raises for bad arguments and returns what ``problem`` and
    ``fake`` want to know of them. problem: what the router is asked, for (name, arguments, what ``check`` returned).
    fake: the outputs' shapes and dtypes. sample: random arguments that pose a problem; meta tensors where ``Draw``
    makes such. example: a small problem. implementations: most preferred first, the definition last. kernels: what
    there is to tune behind them.

    autocast: arguments that are cast to the autocast dtype where they are float, without any there is no rule.
    differentiable: arguments with a gradient, which ``gradients`` returns by name for (gradient of the output,
    arguments, those of ``differentiable`` that are needed). smooth: the operator in float32 or float64 without the
    rounding of activations, in operators of PyTorch: what its derivatives are those of (``derivatives``); None in the
    place of a result that has none. fold: how ``torch.vmap`` makes one call of many. remembered: a compiled graph's
    calls that repeat go straight to what the implementation prepared.
    integer: it multiplies integers. weight_of: the format of a linear operator's weight in a problem. wishes: arguments
    that only ``problem`` reads: what the user wants to be chosen.
    """

    name: str
    package: str
    schema: str
    check: Callable[[str, Arguments], Any]
    problem: Callable[[str, Arguments, Any], Problem]
    fake: Callable[[Arguments, Any], Any]
    sample: Callable[[Problem, Draw], dict[str, Any]]
    example: Problem
    implementations: tuple[Way, ...]
    kernels: tuple[Kernel, ...] = ()
    autocast: tuple[str, ...] = ()
    differentiable: tuple[str, ...] = ()
    gradients: Gradients | None = None
    smooth: Callable[[Arguments], Any] | None = None
    fold: Fold | None = None
    remembered: bool = False
    integer: bool = False
    weight_of: Callable[[Problem], WeightFormat] | None = None
    wishes: tuple[str, ...] = ()

    @property
    def kernel_modules(self) -> Iterator[tuple[str, Callable[[Problem], Problem]]]:
        """The modules of ``kernels``, and the problem that each is asked about. Importing one imports Triton."""
        return ((importlib.util.resolve_name(kernel.module, self.package), kernel.problem) for kernel in self.kernels)


def _absolute(card: Card, path: str) -> str:
    """``path`` in a card's package as "module:function", the function named like the operator if none is given."""
    module, _, function = path.partition(":")
    return f"{importlib.util.resolve_name(module, card.package)}:{function or card.name}"


def _beside(target: str) -> str:
    return f"{target.partition(':')[0]}:why_not"


def _late(path: str) -> Callable[..., Any]:
    """The function at "module:function", imported when it is first called."""

    return lambda *args: imported(path)(*args)


_cards: dict[str, Card] = {}


def add(card: Card) -> None:
    """Make a card known. Raises ValueError if there is one of its operator."""
    if card.name in _cards:
        raise ValueError(f"there is a card of the operator {card.name!r} already")
    _cards[card.name] = card


def cards() -> tuple[Card, ...]:
    """The cards of all operators."""
    return tuple(_cards.values())


def card_of(op: str) -> Card | None:
    """The card of an operator; None for one that is not known by a card."""
    return _cards.get(op)


def make_arguments(problem: Problem, device: str | torch.device = "cpu", seed: int = 0) -> dict[str, Any]:
    """All arguments of ``problem.op`` but wishes by name, random ones drawn from ``seed`` on ``device``; "meta" gives
    tensors without memory.

    ``problem.aligned`` false: the rows of x begin where no 16-byte load can. Raises ValueError for an operator without
    a card.
    """
    card = card_of(problem.op)
    if card is None:
        raise ValueError(f"there are no sample arguments for the operator {problem.op!r}")
    declared = torch._C.parse_schema(card.name + card.schema).arguments
    found: dict[str, Any] = {
        argument.name: argument.default_value
        for argument in declared
        if argument.has_default_value() and argument.name not in card.wishes
    }
    found |= card.sample(problem, Draw(device, seed))
    if not problem.aligned:
        x = found["x"]
        found["x"] = x.new_empty(len(x), problem.k + 1)[:, 1:].copy_(x)
    return found


def folders(package: str) -> Iterator[str]:
    """Modules ``operator`` in the folders of a package, in alphabetical order: where cards are."""
    spec = importlib.util.find_spec(package)
    for home in () if spec is None else spec.submodule_search_locations or ():
        for file in sorted(Path(home).glob("*/operator.py")):
            yield f"{package}.{file.parent.name}.operator"
