"""The options of the backend, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tilewright.convert.recipes import Recipe, patterns_of
from tilewright.convert.text import closest

#: Every kind of rewrite, in the order in which they are made.
REWRITES = ("convolution", "linear", "norm", "epilogue")


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(..., options={...})`` may hold for this backend.

    recipe: what ``convert_model`` takes; None: nothing is quantised. exclude: patterns of layers to leave alone.
    heads: quantise output heads too. rewrites: which kinds of rewrites may be made. inner: the backend that compiles
    what comes out. inductor: Inductor's own options, if that is the inner one.
    """

    recipe: Recipe | None = None
    exclude: tuple[str, ...] = ()
    heads: bool = False
    rewrites: tuple[str, ...] = REWRITES
    inner: str = "inductor"
    inductor: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """Checks every option. Raises ValueError or TypeError that names the option and the known ones."""
        values = dict(given or {})
        known = [each.name for each in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(
                    f"the backend 'tilewright' has no option {name!r}{closest(str(name), known)}; "
                    f"known: {', '.join(known)}"
                )
        if values.get("recipe") is not None:
            values["recipe"] = Recipe.of(values["recipe"])
        if "exclude" in values:
            values["exclude"] = patterns_of(values["exclude"])
        if not isinstance(values.get("heads", False), bool):
            raise TypeError(f"the option heads is True or False, not {values['heads']!r}")
        if "rewrites" in values:
            values["rewrites"] = _rewrites(values["rewrites"])
        if not isinstance(values.get("inner", ""), str):
            raise TypeError(f"the option inner is the name of a backend, not {values['inner']!r}")
        if not isinstance(values.get("inductor", {}), Mapping):
            raise TypeError(f"the option inductor is a dict of Inductor's options, not {values['inductor']!r}")
        return cls(**values)


def _rewrites(given: Any) -> tuple[str, ...]:
    kinds = (given,) if isinstance(given, str) else tuple(given)
    for kind in kinds:
        if kind not in REWRITES:
            raise ValueError(f"the option rewrites knows no {kind!r}, only {', '.join(REWRITES)}")
    return kinds
