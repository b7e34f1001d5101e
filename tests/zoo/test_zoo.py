"""Every architecture of the zoo, converted in every way that has something to convert in it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

import pytest
import torch

from tests.zoo.known import EXPECTED

pytest.importorskip("transformers", reason="the extra `hf` is not installed")
pytest.importorskip("diffusers", reason="diffusers, of the extra `dev`, is not installed")

from tests.zoo.checks import RECIPES
from tests.zoo.huggingface import ROWS, case, recipes

#: What `make test` looks at: a model of each kind.
SAMPLE = ("bert", "qwen2", "mixtral", "mamba", "t5", "resnet", "whisper", "dit")
SAMPLE_RECIPES = ("int8", "int4", "fuse")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The models are tiny: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(name: str, recipe: str, compiled: bool) -> None:
    made = case(name, recipe)
    if not compiled:
        made.compile_with = None
    found, expected = made.failures(), EXPECTED.get((name, recipe), {})
    new = {step: told for step, told in found.items() if step not in expected}
    assert not new, "\n".join(f"{step}: {told}" for step, told in new.items())
    gone = expected.keys() - found.keys() - (set() if compiled else {"compile"})
    assert not gone, f"works now: {sorted(gone)}. Take it out of known.py"


@pytest.mark.parametrize("recipe", SAMPLE_RECIPES)
@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name: str, recipe: str) -> None:
    if recipe not in recipes(name):
        pytest.skip("the architecture has no convolutions, which alone this recipe changes")
    check(name, recipe, compiled=False)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ROWS)
def test_architecture(name: str, recipe: str) -> None:
    if recipe not in recipes(name):
        pytest.skip("the architecture has no layers that this recipe changes")
    check(name, recipe, compiled=True)


#: Layers that an answer does not depend on: of poolers that only other heads read, of attention that needs a picture,
#: or tokens that are chosen, experts that none of the tokens is sent to, and gates of a few numbers.
UNREAD = (
    *("*pooler.dense", "*_global", "*crossattention*", "*experts.expert_*"),
    *("*squeeze_excite*", "*shared_expert_gate"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_layer_is_seen(name: str) -> None:
    """The answer with a layer's weight set to zero is further off than a converted model's may be. Of
    five one may say too little, such as keys that all queries agree with.
    """
    made = case(name, "int8")
    model = made.make()
    made.truth = made.run(model)
    unseen, seen = [], 0
    for layer, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and weight.dim() > 1 and not isinstance(module, torch.nn.Embedding):
            kept = weight.detach().clone()
            weight.data.zero_()
            if not made.holds(made.run(model)):
                seen += 1
            elif not any(fnmatch.fnmatchcase(layer, pattern) for pattern in UNREAD):
                unseen.append(layer)
            weight.data.copy_(kept)
    assert 4 * len(unseen) <= seen, f"{seen} are seen, but not {unseen}"
