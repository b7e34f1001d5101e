"""Your own layer: what the converter does with modules that it does not know, and how to teach it one.

Run it as a whole, ``python examples/own_layer.py``, or cell by cell in an editor that knows ``# %%``.
"""

# %% [markdown]
# ## A model with layers of its own
# Three kinds: a subclass of nn.Linear that only adds attributes, one whose forward does something else, and an
# activation that no library knows.

import tempfile
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import tilewright as tw
from tilewright.convert import Scheme, register_scheme

torch.manual_seed(0)


class NamedLinear(nn.Linear):
    """Computes what nn.Linear computes, and carries an attribute."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.purpose = "projection"


class ScaledLinear(nn.Linear):
    """Computes something else: its output is scaled by a number that is learnt."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * super().forward(x)


class SquaredReLU(nn.Module):
    def forward(self, x):
        return x.relu().square()


class Block(nn.Module):
    def __init__(self, down):
        super().__init__()
        self.up, self.act = NamedLinear(128, 512), SquaredReLU()
        self.down, self.norm = down(512, 128), nn.LayerNorm(128)
        self.mix, self.relu = nn.Linear(128, 128), nn.ReLU()

    def forward(self, x):
        x = self.norm(x + self.down(self.act(self.up(x))))
        return self.relu(self.mix(x))


model = nn.Sequential(Block(ScaledLinear), Block(ScaledLinear)).eval()
x = torch.randn(16, 128)

# %% [markdown]
# ## What is converted
# `up` and `mix` are: they compute what nn.Linear computes, and keep hooks and attributes that were put on them. The
# nn.ReLU right after `mix` is fused into its kernel. The squared ReLU is called as before, as is every module that
# is no layer. `down` is left alone, and the report says why.

small = tw.convert_model(model, "int8", progress=False)
print(tw.report(small))
print(f"0.up: {type(small[0].up).__name__}, its purpose is still {small[0].up.purpose!r}")
print(f"0.down: {type(small[0].down).__name__}")

# %% [markdown]
# ## Make the layer convertible
# Compute the special part outside the nn.Linear, and the product inside can be converted.


class Scaled(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.linear, self.scale = nn.Linear(*sizes), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * self.linear(x)


model = nn.Sequential(Block(Scaled), Block(Scaled)).eval()
small = tw.convert_model(model, "int8", progress=False)
error = (small(x) - model(x)).norm() / model(x).norm()
converted = sum(isinstance(layer, tw.nn.Int8Linear) for layer in small.modules())
print(f"now {converted} of 6 linear layers are int8; the model's answer moves by {100 * error:.1f} %")

# %% [markdown]
# ## A scheme of your own
# A scheme says which modules it is about, why it must leave one alone, and what it builds. This one decides by
# size: int4 for large weights, int8 for small ones. Once it is registered, recipes hold it and checkpoints name it.


@register_scheme
@dataclass(frozen=True)
class BySize(Scheme):
    limit: int = 20_000  # weights

    about: ClassVar[str] = "linear layers"

    @classmethod
    def supports(cls, module):
        return isinstance(module, nn.Linear)

    def why_not(self, module):
        return tw.Int8Dynamic().why_not(module) or ("it has one output" if module.out_features == 1 else None)

    def build(self, module, **calibration):
        if module.weight.numel() > self.limit:
            return tw.nn.Int4Linear.from_float(module, group_size=32)
        return tw.nn.Int8Linear.from_float(module)


def make_model():
    return nn.Sequential(Block(Scaled), Block(Scaled), nn.Linear(128, 1)).eval()


model = make_model()
small = tw.convert_model(model, BySize(), heads=True, progress=False)
print(tw.report(small))
print(f"0.up: {type(small[0].up).__name__}, 0.mix: {type(small[0].mix).__name__}, 2: {type(small[2]).__name__}")

with tempfile.TemporaryDirectory() as saved:
    tw.save_model(small, saved)
    loaded = tw.load_model(saved, make_model).eval()
print(f"loaded again, the same numbers: {torch.equal(small(x), loaded(x))}")
