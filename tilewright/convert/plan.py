"""Which layers of a model a recipe converts, and why it leaves the others alone. Reads the model, changes nothing."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import fx, nn

from tilewright.convert import structure
from tilewright.convert.layers import is_converted
from tilewright.convert.recipes import Recipe, Rule, matches, names_explicitly
from tilewright.convert.schemes.base import Scheme, registered_schemes
from tilewright.convert.text import by_reason, display_name, listed

#: In place of a module of which the name is all that is known.
_UNKNOWN = nn.Module()
FilterFunction = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Planned:
    """One layer to convert. explicit: the rule spells out its name, so it is converted even where that does not pay."""

    scheme: Scheme
    explicit: bool


@dataclass
class Plan:
    """convert: by name of the layer, in the model's order. skipped: name -> reason."""

    convert: dict[str, Planned] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def layers_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module that a scheme could be about or has been applied to, with all its names."""
    kinds = registered_schemes().values()
    found: dict[nn.Module, list[str]] = {}
    for module, names in structure.names_of_modules(model).items():
        if is_converted(module) or any(kind.supports(module) for kind in kinds):
            found[module] = names
    return found


def make_plan(model: nn.Module, recipe: Recipe, filter_fn: FilterFunction | None = None, heads: bool = False) -> Plan:
    """Go through the layers of ``model`` in order.

    Raises ValueError if a pattern matches nothing, naming the nearest layers, or if nothing is left to convert, with
    the reasons.
    """
    layers = layers_of(model)
    if not layers:
        raise ValueError(nothing_to_convert(model, {}))
    _check_patterns(model, layers, recipe)
    tied, head_of = structure.tied_to(model), structure.output_heads(model)
    above = {name: module for module, names in structure.names_of_modules(model).items() for name in names if name}
    plan = Plan()
    for module, names in layers.items():
        decided = decide(module, names, recipe, filter_fn, None if heads else head_of.get(module), tied, above)
        if isinstance(decided, Planned):
            plan.convert[names[0]] = decided
        else:
            plan.skipped[names[0]] = decided
    if not plan.convert:
        raise ValueError(nothing_to_convert(model, plan.skipped))
    return plan


def decide(
    module: nn.Module,
    names: list[str],
    recipe: Recipe,
    filter_fn: FilterFunction | None,
    head: str | None,
    tied: dict[int, str],
    above: Mapping[str, nn.Module] | None = None,
) -> Planned | str:
    """What happens to one layer: converted, or left alone for the reason returned.

    above: by name, the modules that it may lie in; where they are not known, their names say enough for most patterns.
    """
    if is_converted(module):
        return f"already converted ({type(module).__name__})"
    for pattern in recipe.exclude:
        if _leaves_alone(pattern, names, module, above or {}):
            return f"excluded by {pattern!r}"
    if filter_fn is not None and not all(filter_fn(module, name) for name in names):
        return "left out by filter_fn"
    rule = _rule_for(module, names, recipe, above or {})
    if isinstance(rule, str):
        return rule
    if rule.scheme is None:
        return f"left alone by the rule {rule.pattern!r}"
    explicit = names_explicitly(rule.pattern)
    if reason := rule.scheme.why_not(module):
        return reason
    # A shared bias is no obstacle: it stays what it is. Only matrices are replaced.
    matrices = [each for each in module._parameters.values() if each is not None and each.dim() > 1]
    if others := [tied[id(matrix)] for matrix in matrices if id(matrix) in tied]:
        return f"its weight is tied to {others[0]}"
    if rule.scheme.lossless:
        return Planned(rule.scheme, explicit)
    if any(part.startswith("lora_") for part in names[0].split(".")) and not explicit:
        return "a LoRA adapter, which is small and meant to be trained"
    if head is not None and not explicit:
        return f"output head ({head}); heads=True or a rule with its name converts it"
    return Planned(rule.scheme, explicit)


def _leaves_alone(pattern: str, names: list[str], module: nn.Module, above: Mapping[str, nn.Module]) -> bool:
    """Whether a pattern that leaves alone what it matches matches a layer, or a module around it but for the root."""
    for name in names:
        parts = name.split(".")
        around = [".".join(parts[:count]) for count in range(1, len(parts))]
        if matches(pattern, name, module) or any(matches(pattern, each, above.get(each, _UNKNOWN)) for each in around):
            return True
    return False


def _rule_for(module: nn.Module, names: list[str], recipe: Recipe, above: Mapping[str, nn.Module]) -> Rule | str:
    """The first rule that matches and whose scheme is about such a module, or why there is none."""
    passed_over = ""
    for rule in recipe.rules:
        if rule.scheme is None:
            if _leaves_alone(rule.pattern, names, module, above):
                return rule
        elif any(matches(rule.pattern, name, module) for name in names):
            if rule.scheme.supports(module):
                return rule
            passed_over = f"{rule.scheme.stem()} takes {rule.scheme.about}, not {type(module).__name__}"
    return passed_over or "no rule of the recipe matches it"


def _check_patterns(model: nn.Module, layers: dict[nn.Module, list[str]], recipe: Recipe) -> None:
    """Refuse patterns that match nothing. One that leaves layers alone may name any module, not only layers."""
    patterns = [(rule.pattern, rule.scheme is None) for rule in recipe.rules]
    patterns += [(pattern, True) for pattern in recipe.exclude]
    modules = structure.names_of_modules(model)
    for pattern, leaves_alone in patterns:
        candidates = modules if leaves_alone else layers
        if any(matches(pattern, name, module) for module, names in candidates.items() for name in names):
            continue
        message = f"the pattern {pattern!r} matches no layer of {type(model).__name__}"
        if any(matches(pattern, name, module) for module, names in modules.items() for name in names):
            message += f"; it names a module that holds layers: did you mean {pattern + '.*'!r}?"
        else:
            named = {name: module for module, names in candidates.items() for name in names}
            nearest = difflib.get_close_matches(pattern, map(display_name, named), cutoff=0.0)
            message += _meant(pattern, named) or f"; the nearest layer names are {listed(nearest)}"
        raise ValueError(message)


def _meant(pattern: str, named: Mapping[str, nn.Module]) -> str:
    """What somebody may have meant by a pattern that matches none of ``named``, if another spelling matches one."""
    if pattern.startswith("re:"):
        spellings = [f"re:.*{pattern[3:]}.*"]
    else:
        spellings = [f"type:{pattern}", f"*.{pattern}", f"{pattern}*", pattern.lower(), f"re:{pattern}", f"*{pattern}*"]
    for spelling in spellings:
        try:
            if any(matches(spelling, name, module) for name, module in named.items()):
                return f"; did you mean {spelling!r}?"
        except ValueError:  # no regular expression
            continue
    return ""


def nothing_to_convert(model: nn.Module, skipped: dict[str, str]) -> str:
    """What to say about a conversion that would change nothing: every reason, with the layers it holds for."""
    if not skipped:
        about = "; ".join(sorted({kind.about for kind in registered_schemes().values()}))
        graph = "; in an exported graph they are calls: convert the module, then export it"
        hint = graph if isinstance(model, fx.GraphModule) else ""
        return f"nothing to convert in {type(model).__name__}: it has no layer that a scheme takes ({about}){hint}"
    reasons = "\n".join(f"  {reason}: {listed(names, 3)}" for reason, names in by_reason(skipped).items())
    return f"nothing to convert in {type(model).__name__}; every layer is left alone:\n{reasons}"
