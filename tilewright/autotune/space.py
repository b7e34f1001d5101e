"""What can be tuned: a kernel's configurations, which of them a problem may use, and how one is chosen.

    TUNED = Tunable("int4_linear.triton_fused", FusedConfig.for_problem, candidates, hooks, modules, why_not)
    config = TUNED.choose(problem)

A choice is, in this order: fixed by the user (``constraints``), read from a table, tuned now if the user asked for that
(``modes``), picked by the heuristic. A configuration that the kernel's ``why_not`` refuses is never used: the first
candidate that passes takes its place, and ``Choice.reasons`` says so. Knows no kernel by name: kernels register.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from tilewright.aot.launch import Launch
from tilewright.autotune import modes, tables
from tilewright.autotune.clock import Clock
from tilewright.autotune.device import DeviceKind, source_hash
from tilewright.autotune.modes import changed, when_changed
from tilewright.autotune.racing import noise

#: Problems whose choice is remembered, for each kernel.
_REMEMBERED = 4096


@dataclass(frozen=True)
class Trials:
    """How candidates for one problem are tried. run: calls the kernel with one, over inputs and outputs that belong to
    tuning alone. check: what is wrong with the result of ``run``, or None.
    """

    run: Callable[[Any], Any]
    check: Callable[[Any], str | None]
    clock: Clock


@dataclass(frozen=True)
class Hooks:
    """What autotune must know of problems that it cannot look into.

    facts: what a choice depends on, the batch as its bucket. representative: the problem that is timed for the whole
    bucket. device: where it runs. trials: see ``Trials``. launches: those of a configuration over tensors without
    memory, for a backend ("cuda", "hip"), to compile ahead of time; None for what is no Triton kernel.
    """

    facts: Callable[[Any], Mapping[str, object]]
    representative: Callable[[Any], Any]
    device: Callable[[Any], DeviceKind]
    trials: Callable[[Tunable, Any], Trials]
    launches: Callable[[Tunable, Any, Any, str], list[Launch]] | None = None


@dataclass(frozen=True)
class Choice:
    """A configuration, and why it is this one. origin: "constraint", "user", "shipped", "tuned" or "heuristic".

    reasons: in words, what spoke against another that came first.
    """

    config: Any
    origin: str
    reasons: tuple[str, ...] = ()


def accept(config: Any, problem: Any) -> str | None:
    """No constraints."""
    return None


@dataclass(frozen=True, eq=False)
class Tunable:
    """One kernel, or one decision, that tables know by ``name``.

    heuristic: the configuration for a problem without any tuning. candidates: those worth timing. why_not: the reason
    why a configuration cannot serve a problem, or None. modules: whose source a measurement depends on. encode: from a
    configuration to plain values in JSON. limit: from the heuristic's configuration and its seconds to those that
    another must not exceed to replace it.
    """

    name: str
    heuristic: Callable[[Any], Any]
    candidates: Callable[[Any], Iterable[Any]]
    hooks: Hooks
    modules: tuple[str, ...]
    why_not: Callable[[Any, Any], str | None] = accept
    encode: Callable[[Any], dict[str, Any]] = dataclasses.asdict
    limit: Callable[[Any, float], float] = noise
    _memo: dict[Any, Choice] = field(default_factory=dict, init=False, repr=False)
    _forced: ContextVar[Any] = field(init=False, repr=False)
    _tuning: Any = field(default_factory=threading.RLock, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_forced", ContextVar(f"config of {self.name}", default=None))
        if self.name in TUNABLES:
            raise ValueError(f"{self.name!r} is registered already")
        TUNABLES[self.name] = self

    def choose(self, problem: Any) -> Any:
        """The configuration to launch with."""
        forced = self._forced.get()
        if forced is not None:
            return forced
        choice = self._memo.get(problem)
        return (self.explain(problem) if choice is None else choice).config

    def explain(self, problem: Any) -> Choice:
        """The same with its origin. Raises ValueError for constraints of the user that nothing satisfies."""
        fixed = _constraints.get(self.name)
        if fixed:
            return self._remember(problem, self._constrained(problem, fixed))
        found, reasons = self.tuned(problem)
        if found is not None:
            return self._remember(problem, found)
        if modes.tuning_wanted():
            if modes.why_not_now() is not None:
                return self._picked(problem, reasons)  # not remembered: the next call may tune
            return self._remember(problem, self._tune_now(problem, reasons))
        return self._remember(problem, self._picked(problem, reasons))

    @contextlib.contextmanager
    def forced(self, config: Any) -> Iterator[None]:
        """Inside, and in this thread alone, ``choose`` gives ``config``."""
        token = self._forced.set(config)
        try:
            yield
        finally:
            self._forced.reset(token)

    def tuned(self, problem: Any) -> tuple[Choice | None, tuple[str, ...]]:
        """What a table says, and why what it says cannot be used."""
        device = self.hooks.device(problem)
        if tables.is_empty(device):
            return None, ()
        found = tables.lookup(device, self.name, self.hooks.facts(problem), self.source())
        if found is None:
            return None, ()
        entry, origin = found
        # Only what the kernel itself lists: a table that somebody wrote can choose badly, but nothing else.
        config = self.decoder(problem)(entry["config"])
        reason = "it is none of the kernel's" if config is None else self.why_not(config, problem)
        if reason is not None:
            return None, (f"the {origin} table's {entry['config']} is not used: {reason}",)
        return Choice(config, origin), ()

    def decoder(self, problem: Any) -> Callable[[Mapping[str, Any]], Any]:
        """From plain values to the candidate for ``problem`` that they encode, or None."""
        known = {_frozen(self.encode(config)): config for config in self.all_candidates(problem)}
        return lambda encoded: known.get(_frozen(encoded))

    def all_candidates(self, problem: Any) -> list[Any]:
        """The heuristic's configuration first, then the space, what differs least from it first; each once, whether or
        not it can serve.
        """
        first = self.heuristic(problem)
        fields = self.encode(first)

        def distance(config: Any) -> int:
            return sum(fields.get(name) != value for name, value in self.encode(config).items())

        return list(dict.fromkeys([first, *sorted(self.candidates(problem), key=distance)]))

    def split_candidates(self, problem: Any) -> tuple[list[Any], dict[Any, str]]:
        """(those that can serve ``problem``, those that cannot with the reason)."""
        reasons = {config: self.why_not(config, problem) for config in self.all_candidates(problem)}
        serving = [config for config, reason in reasons.items() if reason is None]
        return serving, {config: reason for config, reason in reasons.items() if reason is not None}

    @property
    def is_constrained(self) -> bool:
        """Whether the user fixed something, see ``constraints``."""
        return self.name in _constraints

    def source(self) -> str:
        """Of the code that a measurement depends on."""
        return source_hash(*self.modules)

    def invalidate(self) -> None:
        """Choose anew from now on."""
        self._memo.clear()

    def _remember(self, problem: Any, choice: Choice) -> Choice:
        if len(self._memo) >= _REMEMBERED:
            self._memo.clear()
        self._memo[problem] = choice
        return choice

    def _picked(self, problem: Any, reasons: tuple[str, ...]) -> Choice:
        """The heuristic's, or the first candidate that can serve where that one cannot."""
        config = self.heuristic(problem)
        reason = self.why_not(config, problem)
        if reason is None:
            return Choice(config, "heuristic", reasons)
        reasons = (*reasons, f"the heuristic's {self.encode(config)} is not used: {reason}")
        serving, _ = self.split_candidates(problem)
        if not serving:
            raise ValueError(f"{self.name}: no configuration serves {problem}: {'; '.join(reasons)}")
        return Choice(serving[0], "heuristic", reasons)

    def _constrained(self, problem: Any, fixed: Mapping[str, Any]) -> Choice:
        """The first choice with the ``fixed`` fields, then candidates that have them, then the first choice changed."""
        found, _ = self.tuned(problem)
        first = found.config if found is not None else self.heuristic(problem)
        unknown = sorted(set(fixed) - set(self.encode(first)))
        if unknown:
            known = ", ".join(self.encode(first))
            raise ValueError(f"{self.name}: a configuration has no {', '.join(unknown)}, only {known}")
        candidates = [first, *self.all_candidates(problem)]
        having = [c for c in candidates if all(self.encode(c)[name] == value for name, value in fixed.items())]
        if dataclasses.is_dataclass(first):
            having += [dataclasses.replace(c, **fixed) for c in candidates]
        reasons: list[str] = []
        for config in dict.fromkeys(having):
            reason = self.why_not(config, problem)
            if reason is None:
                return Choice(config, "constraint", tuple(reasons))
            reasons.append(f"{self.encode(config)}: {reason}")
        asked = ", ".join(f"{name}={value}" for name, value in fixed.items())
        raise ValueError(f"{self.name}: no configuration with {asked} serves {problem}: {'; '.join(reasons[:5])}")

    def _tune_now(self, problem: Any, reasons: tuple[str, ...]) -> Choice:
        with self._tuning:
            # Another thread may have tuned it while this one waited.
            found, _ = self.tuned(problem)
            if found is not None:
                return found
            outcome = _tuner[0](self, problem)
        if outcome.config is None or self.why_not(outcome.config, problem) is not None:
            return self._picked(problem, (*reasons, *outcome.words()))
        return Choice(outcome.config, "tuned", reasons)


#: What tunes on first use, from which this file is imported.
_tuner: list[Callable[[Tunable, Any], Any]] = []


def tune_with(tune: Callable[[Tunable, Any], Any]) -> None:
    """Have ``tune`` find the configuration for a problem where the user asked for tuning on first use."""
    _tuner[:] = [tune]


#: Everything that has been registered, by name.
TUNABLES: dict[str, Tunable] = {}
_constraints: dict[str, dict[str, Any]] = {}


@contextlib.contextmanager
def constraints(name: str, **fields: Any) -> Iterator[None]:
    """Inside, in every thread, the kernel called ``name`` uses only configurations with these fields.

        with tilewright.autotune.constraints("int4_linear.triton_fused", splits=1): ...

    Its next launch raises ValueError, with the reasons, where nothing satisfies them. Raises ValueError for an unknown
    name.
    """
    if name not in TUNABLES:
        raise ValueError(f"nothing that is tuned is called {name!r}; known: {', '.join(sorted(TUNABLES))}")
    before = _constraints.get(name)
    _constraints[name] = {**(before or {}), **fields}
    changed()
    try:
        yield
    finally:
        if before is None:
            del _constraints[name]
        else:
            _constraints[name] = before
        changed()


def _frozen(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Comparable whatever the types: in JSON 1, 1.0 and true must not be the same configuration."""
    return tuple(sorted((name, repr(value)) for name, value in config.items()))


def _forget_all() -> None:
    for tunable in TUNABLES.values():
        tunable.invalidate()


when_changed(_forget_all)
