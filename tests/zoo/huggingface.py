"""The architectures of Hugging Face libraries as cases."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from torch import nn

from tests.zoo import diffusion, mixtures, pictures, sounds, text
from tests.zoo.architectures import Row
from tests.zoo.checks import RECIPES, Case

transformers.logging.set_verbosity_error()

ROWS: dict[str, Row] = {
    **text.ENCODERS,
    **text.DECODERS,
    **text.PAIRS,
    **mixtures.MIXTURES,
    **mixtures.STATES,
    **pictures.PICTURES,
    **pictures.WITH_TEXT,
    **sounds.SOUNDS,
    **sounds.OTHERS,
    **diffusion.DIFFUSION,
}

#: Architectures that are compiled, and those that are to the end.
COMPILED = (
    *("roberta", "distilbert", "albert", "electra", "mpnet", "deberta_v2", "modernbert", "fnet", "roformer"),
    "squeezebert",
)
INDUCTOR = ("bert",)


@functools.cache
def convolutional(name: str) -> bool:
    return any(isinstance(module, nn.Conv2d | nn.Conv1d) for module in ROWS[name].build().modules())


def recipes(name: str) -> list[str]:
    """The recipes that have something to convert in an architecture."""
    kinds = {type(module).__name__ for module in ROWS[name].build().modules()}
    several = sum(isinstance(module, nn.Linear) for module in ROWS[name].build().modules()) > 1
    linear = several or "Conv1D" in kinds
    return [
        recipe
        for recipe in RECIPES
        if (convolutional(name) or recipe != "fuse") and (linear or recipe in ("int8", "int8-calibrated", "fuse"))
    ]


def compiler(name: str) -> str | None:
    """What torch.compile uses: Inductor takes minutes for all of them, and even Dynamo does."""
    if name in INDUCTOR:
        return "inductor"
    return ("eager", "aot_eager")[COMPILED.index(name) % 2] if name in COMPILED else None


def case(name: str, recipe: str) -> Case:
    row = ROWS[name]

    def generate(model: Any, use_cache: bool) -> Any:
        inputs = {k: v for k, v in row.inputs().items() if "decoder" not in k}
        options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        return model.generate(**inputs, use_cache=use_cache, **options)

    def first(model: nn.Module) -> Any:
        return model(
            **{k: v[:1] if isinstance(v, torch.Tensor) and len(v) == 2 else v for k, v in row.inputs().items()}
        )

    return Case(
        make=row.make,
        build=row.build,
        call=lambda model: model(**row.inputs()),
        recipe=RECIPES[recipe],
        floor=row.floors.get(recipe, RECIPES[recipe].floor),
        calibration=lambda: [row.inputs()],
        first=first,
        generate=generate if row.generates else None,
        compile_with=compiler(name) if recipe == "int8" else None,
        deep=recipe == "int8",
        convolutional=convolutional(name),
        jumps=row.jumps,
    )
