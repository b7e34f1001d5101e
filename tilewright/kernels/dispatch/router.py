"""One router for every operator: from a ``Problem`` to the implementation that serves it.

``route`` is a pure function of the problem and of what is registered. Implementations stand in order of preference; the
first that has no reason against the problem serves it, and the reasons of those before it go into the report.

Adding an implementation is one call of ``register``. A package can offer its own under the entry-point group
``tilewright.kernels``: an entry point names a function without arguments that calls ``register``. It runs only when
``load_plugin`` is given its name, never on import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, NamedTuple

import torch

from tilewright.kernels.dispatch.problem import Problem, device_facts

PLUGIN_GROUP = "tilewright.kernels"
#: ``Decision.origin`` where nothing was timed and nobody fixed anything.
ORDER = "order of preference"


class Preferred(NamedTuple):
    """The name of an implementation that goes before all others, the words for that, and ``Decision.origin``."""

    name: str
    words: str
    origin: str


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    name: as the report prints it. op: the operator. why_not: the reason why it does not take a problem, or None if it
    does. target: "module:function" of a function of the operator's arguments, all given by name, imported when it
    first serves a call; "" where ``prepare`` says all. prepare: likewise, of a function of the operator's arguments but
    x and the residual, and of ``k``, the columns of x, which returns one of x and the residual. Layers call that in
    eager inference, for inputs of one shape and dtype. handed_on: the problem of another operator that it has solved
    for a problem, or None where it multiplies itself. wishes: arguments of the operator that say only which
    implementation is to be chosen, so that none is given them.
    """

    name: str
    op: str
    why_not: Callable[[Problem], str | None]
    target: str
    prepare: str | None = None
    handed_on: Callable[[Problem], Problem | None] | None = None
    wishes: tuple[str, ...] = ()

    @functools.cached_property
    def prepared(self) -> Callable[..., Any] | None:
        """The function behind ``prepare``, or None."""
        return None if self.prepare is None else self._without_wishes(imported(self.prepare))

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The function behind ``target``."""
        prepare = self.prepared
        if self.target or prepare is None:
            return self._without_wishes(imported(self.target))

        def call(x: torch.Tensor, residual: torch.Tensor | None = None, **arguments: Any) -> torch.Tensor:
            return prepare(**arguments, k=x.shape[-1])(x, residual)

        return call

    def _without_wishes(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self.wishes:
            return function
        wishes = frozenset(self.wishes)

        @functools.wraps(function)
        def call(*operands: Any, **named: Any) -> Any:
            return function(*operands, **{name: value for name, value in named.items() if name not in wishes})

        return call


def imported(target: str) -> Callable[..., Any]:
    """The function at "module:function"."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Decision:
    """The implementation that serves a problem, and those preferred to it with their reasons against it. origin: from
    where the choice came, in a few words.
    """

    implementation: Implementation
    declined: tuple[tuple[str, str], ...] = field(default=())
    origin: str = ORDER

    @property
    def name(self) -> str:
        """Name of the chosen implementation."""
        return self.implementation.name

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.declined)
        return f"{self.name} ({reasons})" if reasons else self.name


_registered: dict[str, list[Implementation]] = {}


def register(implementation: Implementation, before: str | None = None) -> None:
    """Add an implementation as the least preferred one, or in front of the one called ``before``.

    Raises ValueError if the operator already has one of that name, or none called ``before``.
    """
    known = _registered.setdefault(implementation.op, [])
    names = [other.name for other in known]
    if implementation.name in names:
        raise ValueError(f"operator {implementation.op!r} already has an implementation called {implementation.name!r}")
    if before is not None and before not in names:
        raise ValueError(
            f"operator {implementation.op!r} has no implementation called {before!r}, only {', '.join(names)}"
        )
    known.insert(len(known) if before is None else names.index(before), implementation)
    invalidate()


def unregister(op: str, name: str) -> None:
    """Remove an implementation. Raises ValueError if there is none of that name."""
    kept = [other for other in _registered.get(op, []) if other.name != name]
    if len(kept) == len(_registered.get(op, [])):
        raise ValueError(f"operator {op!r} has no implementation called {name!r}")
    _registered[op] = kept
    invalidate()


def implementations(op: str) -> tuple[Implementation, ...]:
    """All implementations of an operator, most preferred first."""
    return tuple(_registered.get(op, ()))


@functools.lru_cache(maxsize=4096)
def route(problem: Problem) -> Decision:
    """Which implementation serves ``problem``. Raises NotImplementedError that lists every reason if none does."""
    return _decide(problem, _measured(problem))


def describe(problem: Problem) -> str:
    """The name of what serves ``problem``, and of what that hands it on to. Raises as ``route``."""
    implementation = route(problem).implementation
    inner = None if implementation.handed_on is None else implementation.handed_on(problem)
    return implementation.name if inner is None else f"{implementation.name}: {describe(inner)}"


def default_decision(problem: Problem) -> Decision:
    """What ``route`` says where nothing was timed and the user fixed nothing: the choice to beat."""
    return _decide(problem, None)


def _decide(problem: Problem, measured: Preferred | None) -> Decision:
    declined: list[tuple[str, str]] = []
    faster = measured or _faster(problem)
    if faster is not None and not _supports(faster.name, problem):
        faster = None
    for implementation in _registered.get(problem.op, ()):
        reason = implementation.why_not(problem)
        if reason is None and faster is not None and implementation.name != faster.name:
            reason = faster.words
        if reason is None:
            return Decision(implementation, tuple(declined), ORDER if faster is None else faster.origin)
        declined.append((implementation.name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in declined) or "nothing is registered for it"
    raise NotImplementedError(f"no implementation of {problem.op} takes {problem}: {reasons}")


def _supports(name: str, problem: Problem) -> bool:
    return any(other.name == name and other.why_not(problem) is None for other in implementations(problem.op))


@functools.lru_cache(maxsize=8192)
def resolve(
    op: str, m: int, n: int, k: int, x_dtype: torch.dtype, device: torch.device, **facts: Any
) -> Callable[..., Any]:
    """The function that serves a call on ``device``; ``facts`` are further fields of ``Problem``. Remembered, for
    speed.
    """
    return route_call(Problem(op, m, n, k, x_dtype, **facts, **device_facts(device))).implementation.function


_notes: list[Problem] | None = None


@contextlib.contextmanager
def record_problems() -> Iterator[list[Problem]]:
    """Inside, in every thread, each problem that a call poses is added to the list: once, and before it is served."""
    global _notes
    before, _notes = _notes, []
    invalidate()
    try:
        yield _notes
    finally:
        _notes = before


def records_problems() -> bool:
    """Whether somebody lists the problems that calls pose."""
    return _notes is not None


def route_call(problem: Problem) -> Decision:
    """``route`` for a call that is about to be served: what the user wants tuned on first use is tuned before."""
    if _notes is not None:
        _notes.append(problem)
    _before_call(problem)
    return route(problem)


def _nothing(problem: Problem) -> None:
    """What nobody has said of ``problem``."""


_faster: Callable[[Problem], Preferred | None] = _nothing
_measured: Callable[[Problem], Preferred | None] = _nothing
_before_call: Callable[[Problem], None] = _nothing


def set_choices(
    faster: Callable[[Problem], Preferred | None],
    measured: Callable[[Problem], Preferred | None],
    before_call: Callable[[Problem], None],
) -> None:
    """Have ``route`` pass over all others for the implementation that ``measured`` names, or else ``faster``, with the
    words that it gives for that, where it takes the problem; both return None where the order of registration stands.
    ``before_call`` is run for each problem that is served for the first time.
    """
    global _faster, _measured, _before_call
    _faster, _measured, _before_call = faster, measured, before_call
    invalidate()


_generation = 0


def generation() -> int:
    """How often ``invalidate`` was called: a decision that was remembered at another age may be another now."""
    return _generation


_on_invalidate: list[Callable[[], None]] = []


def on_invalidate(clear: Callable[[], None]) -> None:
    """Have ``clear`` called whenever what is registered changes: for those who remember what ``route`` said."""
    _on_invalidate.append(clear)


def invalidate() -> None:
    """Ask every implementation anew: what can be used, or in which order, has changed."""
    global _generation
    _generation += 1
    route.cache_clear()
    resolve.cache_clear()
    for clear in _on_invalidate:
        clear()


def load_plugin(name: str) -> None:
    """Run the entry point called ``name`` of the group ``tilewright.kernels``. Raises ValueError naming those
    installed.
    """
    found = {point.name: point for point in entry_points(group=PLUGIN_GROUP)}
    if name not in found:
        raise ValueError(f"no kernel plugin is called {name!r}; installed: {', '.join(sorted(found)) or 'none'}")
    found[name].load()()
