"""Recipes: which scheme each layer gets. Ordered rules, the first that matches wins; ``None`` leaves a layer alone.

A pattern is one of
    "encoder.*.attn.*"       a glob over the full dotted name (``*`` crosses dots)
    "re:encoder\\.[0-3]\\..*"  a regular expression that the full dotted name matches
    "type:Linear"            a class by its name or dotted name; subclasses match too. A class object does as well
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import nn

from tilewright.convert import schemes
from tilewright.convert.regular import MOST_WAYS, ways_to_match
from tilewright.convert.schemes import Scheme, registered_schemes, scheme_from_json
from tilewright.convert.text import closest

Pattern = str | type[nn.Module]
RecipeLike = Union["Recipe", Scheme, str, Mapping[Pattern, Scheme | str | None]]

FORMAT_VERSION = 1

#: What a string stands for: a name, another one for every day, and the schemes, the further ones for layers of other
#: kinds. A name says the bits of weights (w) and of activations (a); "-g32" is a size of groups.
#: int4 weights get zero points where that costs no time: on a sentence encoder they lower the error as much as a group
#: half the size does. Multiplied with int8 activations they cost a GPU time, so there they are symmetric.
_TABLE: tuple[tuple[Any, ...], ...] = (
    ("w8a8", "int8", schemes.Int8Dynamic(), schemes.Int8Static()),
    ("w8a8-static", "int8-static", schemes.Int8Static(), schemes.Int8StaticInputs()),
    ("w8a16", "int8-weight-only", schemes.Int8WeightOnly()),
    ("w4a16", "int4", schemes.Int4WeightOnly()),
    ("w4a16-g64", "int4-g64", schemes.Int4WeightOnly(group_size=64)),
    ("w4a16-g32", "int4-g32", schemes.Int4WeightOnly(group_size=32)),
    ("w4a16-symmetric", "int4-symmetric", schemes.Int4WeightOnly(symmetric=True)),
    ("w4a8", "int8-int4", schemes.Int8ActInt4Weight()),
    ("w4a8-g32", "int8-int4-g32", schemes.Int8ActInt4Weight(group_size=32)),
    ("sparse24-w16a16", "sparse24", schemes.Sparse24(), schemes.Sparse24Conv()),
    ("sparse24-w8a8", "sparse24-int8", schemes.Sparse24Int8()),
    ("sparse24-w4a16", "sparse24-int4", schemes.Sparse24Int4()),
    ("sparse24-conv", "", schemes.Sparse24Conv(pruning="magnitude")),
    ("fuse", "", schemes.Fuse()),
)
ALIASES: dict[str, str] = {alias: name for name, alias, *_ in _TABLE if alias}
PRESETS: dict[str, Scheme] = {name: scheme for name, _, scheme, *_ in _TABLE}
PRESETS |= {alias: PRESETS[name] for alias, name in ALIASES.items()}
_FURTHER: dict[str, tuple[Scheme, ...]] = {row[0]: row[3:] for row in _TABLE}
#: The preset next to what other libraries and formats are called.
_ELSEWHERE = {
    **dict.fromkeys(
        ("8", "8bit", "i8", "fp8", "float8", "e4m3", "e5m2", "mxfp8", "q8", "qint8", "dynamic", "auto"), "int8"
    ),
    **dict.fromkeys(
        ("4", "4bit", "i4", "fp4", "nf4", "float4", "mxfp4", "nvfp4", "awq", "gptq", "uint4", "qint4"), "int4"
    ),
    **dict.fromkeys(("q40", "q41", "q4km", "q4ks", "hqq"), "int4-g32"),
    **dict.fromkeys(("q80", "weightonly", "int8wo", "w8", "bnb8", "llmint8"), "w8a16"),
    **dict.fromkeys(("static", "qdq", "ptq"), "int8-static"),
    **dict.fromkeys(("2:4", "24", "sparse", "semistructured"), "sparse24"),
}


def formats(module: type[nn.Module]) -> dict[str, Scheme]:
    """By stem: the schemes that make layers of this class, but for those that prune or are nothing without data."""
    made = [kind() for kind in registered_schemes().values() if kind.module and issubclass(kind.module, module)]
    return {scheme.stem(): scheme for scheme in made if not scheme.needs_data and not hasattr(scheme, "pruning")}


@functools.lru_cache(maxsize=1024)
def matcher(pattern: str) -> Callable[[str, nn.Module], bool]:
    """The predicate (name, module) -> bool that a pattern stands for. Raises ValueError for a broken pattern."""
    kind, _, rest = pattern.partition(":")
    if kind == "re":
        try:
            expression = re.compile(rest)
        except re.error as error:
            glob = f"; without 're:', {rest!r} is a glob" if "\\" not in rest else ""
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}{glob}") from error
        if ways_to_match(rest) > MOST_WAYS:
            raise ValueError(
                f"pattern {pattern!r} can match a name in so many ways that trying them may take for ever: "
                "repeat nothing that holds a repeat or alternatives, and use * and + at most five times"
            )
        return lambda name, module: expression.fullmatch(name) is not None
    if kind == "type":
        if not rest:
            raise ValueError(f"pattern {pattern!r} names no class")
        return lambda name, module: any(rest in (c.__name__, _class_name(c)) for c in type(module).__mro__)
    return lambda name, module: fnmatch.fnmatchcase(name, pattern)


def matches(pattern: str, name: str, module: nn.Module) -> bool:
    """Whether a pattern (see the head of this file) matches the module called ``name``."""
    return matcher(pattern)(name, module)


def names_explicitly(pattern: str) -> bool:
    """Whether a pattern spells out the last part of the names it matches: "lm_head", "model.*.head", but not "*"."""
    if pattern.startswith(("re:", "type:")):
        return False
    return not set(pattern.rpartition(".")[2]) & set("*?[")


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _pattern(pattern: object) -> str:
    if isinstance(pattern, type) and issubclass(pattern, nn.Module):
        return f"type:{_class_name(pattern)}"
    if isinstance(pattern, nn.Module):
        kind = type(pattern).__name__
        raise TypeError(f"a pattern is a string or a class of modules, not a module: write the name of this {kind}")
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern is a string or a class of modules, not {pattern!r}")
    matcher(pattern)
    return pattern


def _schemes(scheme: object) -> tuple[Scheme | None, ...]:
    if isinstance(scheme, str):
        if scheme not in PRESETS:
            raise ValueError(f"preset {scheme!r} is unknown{_meant_by(scheme)}; known: {', '.join(PRESETS)}")
        return PRESETS[scheme], *_FURTHER.get(ALIASES.get(scheme, scheme), ())
    if scheme is not None and not isinstance(scheme, Scheme):
        raise TypeError(f"a rule gives a scheme, the name of a preset or None, not {_no_scheme(scheme)}")
    return (scheme,)


def _meant_by(name: str) -> str:
    """What somebody who writes an unknown preset may have meant."""
    if name.lstrip().startswith(("{", "[")):
        return ": for JSON text, Recipe.from_json(json.loads(text))"
    if name.endswith(".json"):
        return ": for a file, Recipe.from_json(json.loads(path.read_text()))"
    if set(name) & set("*?[.") or name.startswith(("re:", "type:")):
        return f", and looks like a pattern: {{{name!r}: 'int8'}} converts what matches it"
    base, _, group = name.partition("-g")
    kind = {"int4": "Int4WeightOnly", "w4a16": "Int4WeightOnly", "w4a8": "Int8ActInt4Weight"}.get(base)
    if kind and group.isdecimal():
        return f": tw.{kind}(group_size={group}) has groups of that size"
    plain = "".join(each for each in name.lower() if each not in "-_ .")
    return f", did you mean {_ELSEWHERE[plain]!r}?" if plain in _ELSEWHERE else closest(name, PRESETS)


def _no_scheme(value: object) -> str:
    """What came in place of a scheme, and what to write."""
    if isinstance(value, type) and issubclass(value, Scheme):
        return f"the class {value.__name__}: write tw.{value.__name__}()"
    name = str(value).removeprefix("torch.")
    if isinstance(value, (torch.dtype, int)) and not isinstance(value, bool):
        return f"{value!r}{_meant_by(name)}"
    if isinstance(value, (list, tuple)):
        return f"{value!r}: Recipe([(pattern, scheme), ...]) takes rules"
    return f"{value!r}: None leaves a layer alone" if value is False else repr(value)


def patterns_of(patterns: Pattern | Iterable[Pattern]) -> tuple[str, ...]:
    """One pattern, or several, as a tuple of checked strings."""
    if isinstance(patterns, (str, type, nn.Module)):
        patterns = (patterns,)
    return tuple(_pattern(pattern) for pattern in patterns)


@dataclass(frozen=True)
class Rule:
    """``pattern`` gets ``scheme``; None leaves what matches alone."""

    pattern: str
    scheme: Scheme | None


#: The option of schemes that ``Recipe.keeping_dequantized`` sets.
_KEEP = "keep_dequantized"


def _keeping(scheme: Scheme | None) -> Scheme | None:
    changed: dict[str, Any] = {_KEEP: True}
    return scheme if scheme is None or not hasattr(scheme, _KEEP) else dataclasses.replace(scheme, **changed)


def _pair(rule: Any) -> tuple[Pattern, Scheme | str | None]:
    """Pattern and scheme of a rule."""
    if isinstance(rule, Rule):
        return rule.pattern, rule.scheme
    if not isinstance(rule, (tuple, list)) or len(rule) != 2:
        raise TypeError(f"a rule is a pair (pattern, scheme), not {rule!r}")
    pattern, scheme = rule
    if isinstance(pattern, Scheme) or (pattern in PRESETS and isinstance(scheme, str) and scheme not in PRESETS):
        raise TypeError(f"a rule is a pair (pattern, scheme): ({scheme!r}, {pattern!r}), not {rule!r}")
    return pattern, scheme


@dataclass(frozen=True, init=False)
class Recipe:
    """Ordered rules, and patterns of layers that none of them may touch.

    rules: ``Rule``s or pairs (pattern, scheme, name of a preset or None). exclude: patterns. Raises ValueError for a
    pattern that is broken or a preset that is unknown, TypeError for anything that is neither.

    >>> import tilewright as tw
    >>> recipe = Recipe([("*.attn.*", "int8"), ("*.mlp.*", tw.Int4WeightOnly(group_size=32))], exclude="layers.0.*")
    >>> Recipe.from_json(recipe.to_json()) == recipe
    True
    """

    rules: tuple[Rule, ...]
    exclude: tuple[str, ...]

    def __init__(
        self,
        rules: Sequence[Rule | tuple[Pattern, Scheme | str | None]],
        exclude: Pattern | Iterable[Pattern] = (),
    ) -> None:
        if isinstance(rules, (str, type, Mapping, Scheme, Rule)) or not isinstance(rules, Iterable):
            raise TypeError(
                f"the rules of a recipe are a list of pairs (pattern, scheme), not {rules!r}; Recipe.of takes whatever "
                "convert_model does"
            )
        pairs = [_pair(rule) for rule in rules]
        if not pairs:
            raise ValueError("a recipe needs at least one rule")
        object.__setattr__(self, "rules", tuple(Rule(_pattern(p), s) for p, given in pairs for s in _schemes(given)))
        object.__setattr__(self, "exclude", patterns_of(exclude))

    @classmethod
    def of(cls, recipe: RecipeLike) -> Recipe:
        """A recipe from what stands for one: a preset's name, a scheme for every layer, {pattern: scheme}, a recipe, or
        what ``to_json`` of a recipe or a scheme made.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, (str, Scheme)):
            return cls([("*", recipe)])
        if isinstance(recipe, Mapping):
            if {"version", "rules"} <= set(recipe):
                return cls.from_json(dict(recipe))
            return cls([("*", scheme_from_json(recipe))] if {"version", "scheme"} <= set(recipe) else [*recipe.items()])
        raise TypeError(
            f"a recipe is a Recipe, a scheme, the name of a preset or a dict of them, not {_no_scheme(recipe)}"
        )

    def excluding(self, patterns: Pattern | Iterable[Pattern]) -> Recipe:
        """The same recipe with further patterns excluded."""
        return Recipe(self.rules, (*self.exclude, *patterns_of(patterns)))

    def keeping_dequantized(self) -> Recipe:
        """The same recipe with ``keep_dequantized=True`` in every scheme that has the option. Raises ValueError if none
        does.
        """
        rules = [dataclasses.replace(rule, scheme=_keeping(rule.scheme)) for rule in self.rules]
        if not any(getattr(rule.scheme, _KEEP, False) for rule in rules):
            raise ValueError(
                f"{_KEEP} is for weights that are multiplied with float activations, as by the presets int4 and "
                "int8-weight-only; no rule of this recipe makes such layers"
            )
        return Recipe(rules, self.exclude)

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON-able dict."""
        rules = [{"pattern": r.pattern, "scheme": r.scheme.to_json() if r.scheme else None} for r in self.rules]
        return {"version": FORMAT_VERSION, "rules": rules, "exclude": list(self.exclude)}

    @classmethod
    def from_json(cls, data: Any) -> Recipe:
        """The recipe that ``to_json`` wrote. Raises ValueError for an unknown version, key, scheme or option."""
        if not isinstance(data, dict) or data.get("version") != FORMAT_VERSION:
            version = data.get("version") if isinstance(data, dict) else None
            raise ValueError(f"a recipe of version {version!r} came, this Tilewright reads version {FORMAT_VERSION}")
        if set(data) != {"version", "rules", "exclude"}:
            raise ValueError(f"a recipe in JSON has the keys version, rules and exclude, not {', '.join(sorted(data))}")
        rules: list[tuple[Pattern, Scheme | str | None]] = []
        for rule in data["rules"]:
            if not isinstance(rule, dict) or set(rule) != {"pattern", "scheme"}:
                raise ValueError(f"a rule in JSON has the keys pattern and scheme; came {rule!r}")
            rules.append((rule["pattern"], None if rule["scheme"] is None else scheme_from_json(rule["scheme"])))
        return cls(rules, data["exclude"])
