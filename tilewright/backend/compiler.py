"""The backend itself: what ``torch.compile(model, backend="tilewright")`` calls for each graph it captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from tilewright.backend import convolutions, epilogues, linears, norms
from tilewright.backend.captured import AllPrepared, Captured
from tilewright.backend.options import Options
from tilewright.backend.record import keep
from tilewright.convert.text import closest


def tilewright(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite the graph, let the inner backend compile it, and return a function of the graph's inputs.

    mode: as of ``torch.compile`` ("reduce-overhead", "max-autotune", ...). options: see ``options.Options``. Raises
    ValueError for an unknown one.
    """
    settings = Options.of(options)
    patches = _inductor_options(mode, settings)
    captured = Captured(gm, example_inputs)
    if captured.transforms:
        # Nodes that nobody reads are what switches them on and off, and layers are called on tensors of their own.
        captured.report.notes.append("it calls a transformation of torch.func: it is compiled as it is")
        keep(captured.report)
        return _compile(gm, list(example_inputs), settings, mode, patches)
    recipe = None if settings.recipe is None else settings.recipe.excluding(settings.exclude)
    if "convolution" in settings.rewrites:
        convolutions.rewrite(captured, recipe, settings.exclude)
    if "linear" in settings.rewrites:
        linears.rewrite(captured, recipe, settings.heads)
    if "epilogue" in settings.rewrites:
        epilogues.rewrite(captured)
    if "norm" in settings.rewrites:
        norms.rewrite(captured)
    kept, inputs = captured.finish()
    keep(captured.report)
    compiled = _compile(captured.gm, inputs, settings, mode, patches)
    if not captured.prepared and len(kept) == len(example_inputs):
        return compiled
    prepared = AllPrepared(captured.prepared)

    def run(*args: Any) -> Any:
        return compiled(*[args[i] for i in kept], *prepared(args))

    return run


def _inductor_options(mode: str | None, settings: Options) -> dict[str, Any]:
    """Inductor's configuration for a mode and the options passed on to it."""
    if settings.inner != "inductor":
        if settings.inductor:
            raise ValueError(f"the option inductor is for the inner backend 'inductor', not {settings.inner!r}")
        return {}
    from torch import _inductor

    modes = _inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise ValueError(f"mode {mode!r} is unknown{closest(mode, modes)}; known: {', '.join(modes)}")
    known = _inductor.list_options()
    for name in settings.inductor:
        if name.replace("-", "_") not in known:
            raise ValueError(f"Inductor has no option {name!r}{closest(name, known)}")
    given = {name.replace("-", "_"): value for name, value in settings.inductor.items()}
    return {**(modes[mode] if mode else {}), **given}


def _compile(
    gm: fx.GraphModule, inputs: list[Any], settings: Options, mode: str | None, patches: dict[str, Any]
) -> Callable[..., Any]:
    if settings.inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, inputs, config_patches=patches)  # type: ignore[return-value]
    from torch._dynamo.backends.registry import lookup_backend

    if settings.inner == "tilewright":
        raise ValueError("the inner backend of 'tilewright' cannot be itself")
    kwargs = {"mode": mode} if mode else {}
    return lookup_backend(settings.inner)(gm, inputs, **kwargs)
